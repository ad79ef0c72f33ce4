"""Once the Sentry is locked into an empty root it can import nothing: what a handler imports must be there before."""

from __future__ import annotations

import ast
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[2] / "kvmsentry"
SERVING = ("kernel", "syscall", "fs", "net", "mm", "vcpu", "gofer/client.py", "gofer/p9.py", "log.py", "errors.py")
LOADED = """
import sys
from kvmsentry.sandbox import boot, launch
from kvmsentry.gofer import client
from kvmsentry.vcpu import machine
from kvmsentry.syscall import table, strace
table.load()
boot.preload()
print(*sys.modules)
"""


def late_imports() -> dict[str, set[str]]:
    """Module to the files that import it inside a function."""
    found: dict[str, set[str]] = {}
    for name in SERVING:
        path = ROOT / name
        for file in [path] if path.is_file() else path.rglob("*.py"):
            if file.name in ("cffi_build.py", "traits.py", "support.py"):
                continue  # used before the lock-down only
            for function in ast.walk(ast.parse(file.read_text())):
                if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
                    continue
                for node in ast.walk(function):
                    modules: list[str] = []
                    if isinstance(node, ast.Import):
                        modules = [alias.name for alias in node.names]
                    elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                        modules = [node.module]
                    for module in modules:
                        found.setdefault(module, set()).add(str(file.relative_to(ROOT)))
    return found


def test_nothing_is_left_to_import() -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    late = late_imports()
    assert "kvmsentry.kernel" in late  # the search finds what it looks for
    missing = {module: files for module, files in late.items() if module not in loaded}
    assert not missing
