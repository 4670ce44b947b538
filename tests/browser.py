"""A real Chromium, headless, driven through Debian's chromedriver: the WebDriver protocol is JSON
over HTTP, so the standard library suffices.
"""

import base64
import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import tempfile
import time
from pathlib import Path

MISSING = " and ".join(name for name in ("chromium", "chromedriver") if shutil.which(name) is None)
FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-extensions",
    "--disable-background-networking",
    "--disable-component-update",
    "--hide-scrollbars",
    "--force-device-scale-factor=1",
]


def processes_of(folder: str) -> list[int]:
    """Ids of the processes with the folder on their command line, as all the browser's have."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit() and int(entry.name) != os.getpid():
            try:
                if folder.encode() in (entry / "cmdline").read_bytes():
                    found.append(int(entry.name))
            except OSError:
                # The process has ended meanwhile.
                pass
    return found


class Browser:
    def __init__(self):
        self.folder = tempfile.mkdtemp(prefix="driftcast-browser-")
        self.log = open(Path(self.folder) / "driver.log", "w+")
        self.driver = subprocess.Popen(
            ["chromedriver", "--port=0"],
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": self.folder, "HOME": self.folder},
        )
        try:
            self.port = int(self.until(self.announced, "chromedriver to start"))
            options = {
                "binary": shutil.which("chromium"),
                "args": [*FLAGS, f"--user-data-dir={self.folder}/profile"],
            }
            asked = {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            self.session = self.send("POST", "/session", {"capabilities": {"alwaysMatch": asked}})[
                "sessionId"
            ]
        except BaseException:
            self.close()
            raise

    def announced(self) -> str:
        text = (Path(self.folder) / "driver.log").read_text()
        return text.partition("successfully on port ")[2].partition(".")[0]

    def send(self, method: str, path: str, body: dict | None = None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        connection.request(method, path, json.dumps(body or {}) if method == "POST" else None)
        value = json.loads(connection.getresponse().read())["value"]
        connection.close()
        if isinstance(value, dict) and "error" in value:
            raise AssertionError(f"{path}: {value['error']}: {value['message']}")
        return value

    def call(self, path: str, **body):
        return self.send("POST", f"/session/{self.session}{path}", body)

    def devtools(self, command: str, **params):
        return self.call("/goog/cdp/execute", cmd=command, params=params)

    def run(self, script: str, *args):
        """Run a script in the page; return the value of its `return`."""
        return self.call("/execute/sync", script=script, args=args)

    def until(self, condition, what: str, deadline: float = 120):
        """Wait until a function, or a script given as a string, returns a true value; return it."""
        end = time.monotonic() + deadline
        while not (
            value := self.run(f"return {condition}") if isinstance(condition, str) else condition()
        ):
            assert time.monotonic() < end, f"waited {deadline:.0f} s for {what}"
            time.sleep(0.05)
        return value

    def open(self, page: Path, width: int = 1200, height: int = 1600, dark: bool = False) -> None:
        self.devtools(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=width < 600,
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.devtools("Emulation.setEmulatedMedia", features=[scheme])
        self.call("/url", url=page.resolve().as_uri())

    def press(self, key: str) -> None:
        keys = [{"type": "keyDown", "value": key}, {"type": "keyUp", "value": key}]
        self.call("/actions", actions=[{"type": "key", "id": "keyboard", "actions": keys}])

    def errors(self) -> list[str]:
        """The console messages since the last call."""
        return [entry["message"] for entry in self.call("/se/log", type="browser")]

    def screenshot(self, file: Path, whole: bool = False) -> None:
        shot = self.devtools("Page.captureScreenshot", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(shot["data"]))

    def close(self) -> None:
        """End the session and the driver, then kill the processes that are left."""
        try:
            if hasattr(self, "session"):
                self.send("DELETE", f"/session/{self.session}")
        finally:
            self.driver.terminate()
            self.driver.wait()
            self.log.close()
            for pid in processes_of(self.folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            shutil.rmtree(self.folder, ignore_errors=True)
