"""benchmarks/RESULTS.md: one section per benchmark, replaced by the last run of it."""

import datetime
import platform
import re
from pathlib import Path

import torch

from runtime.process import has_fast_bf16

HERE = Path(__file__).parent


def machine() -> str:
    """And the day."""
    day = datetime.date.today().isoformat()
    if torch.cuda.is_available():
        return f"{day}, {torch.cuda.get_device_name()}, torch {torch.__version__}"
    amx = "with" if has_fast_bf16(torch.device("cpu")) else "without"
    return f"{day}, {torch.get_num_threads()} CPU threads ({platform.machine()} {amx} AMX), torch {torch.__version__}"


def write(section: str, text: str, folder: Path = HERE) -> Path:
    """Put `text` (Markdown) under the heading `section` of folder/RESULTS.md, in place of what was there."""
    file = folder / "RESULTS.md"
    old = file.read_text() if file.exists() else "# Results of the benchmarks\n"
    head, *sections = re.split(r"(?m)^(?=## )", old)
    kept = {part.splitlines()[0]: part for part in sections}
    kept[f"## {section}"] = f"## {section}\n\n{text}"
    file.write_text("\n\n".join(part.strip() for part in (head, *kept.values())) + "\n")
    return file
