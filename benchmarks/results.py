"""Write benchmarks/RESULTS.md: a section per benchmark, replaced by each run of the benchmark."""

import datetime
import platform
import re
from pathlib import Path

import torch

from runtime.process import has_fast_bf16

HERE = Path(__file__).parent


def describe_machine() -> str:
    """Today's date, the processor and the version of torch."""
    day = datetime.date.today().isoformat()
    if torch.cuda.is_available():
        return f"{day}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    amx = "with" if has_fast_bf16(torch.device("cpu")) else "without"
    processor = f"{torch.get_num_threads()} CPU threads ({platform.machine()} {amx} AMX)"
    return f"{day}, {processor}, torch {torch.__version__}"


def write(section: str, text: str, folder: Path = HERE) -> Path:
    """Replace or add the section `section` of folder/RESULTS.md with `text` (Markdown)."""
    file = folder / "RESULTS.md"
    old = file.read_text() if file.exists() else "# Results of the benchmarks\n"
    head, *sections = re.split(r"(?m)^(?=## )", old)
    parts = {part.splitlines()[0]: part for part in sections}
    parts[f"## {section}"] = f"## {section}\n\n{text}"
    file.write_text("\n\n".join(part.strip() for part in (head, *parts.values())) + "\n")
    return file
