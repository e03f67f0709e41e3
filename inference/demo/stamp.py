"""Which source a trained demo model was made from; without torch, so that a start can ask quickly."""

import hashlib
from pathlib import Path

STAMP = "demo.json"


def source_hash() -> str:
    """Identifies what a trained model was made from: the files of this package."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def is_trained(folder: Path) -> bool:
    """Whether `folder` holds the model that this source would train."""
    stamp = folder / STAMP
    return stamp.is_file() and stamp.read_text() == source_hash()
