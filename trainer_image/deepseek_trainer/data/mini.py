"""The corpus in the repository: a few hundred kB of free text (see corpus/mini/NOTICE), prepared.

`python -m deepseek_trainer.data.mini` makes the prepared files again from the text.
"""

import shutil
import tempfile
from pathlib import Path
from typing import Final

from deepseek_trainer.data.corpus import BUILTIN
from deepseek_trainer.data.prepare import prepare

MINI: Final = BUILTIN / "mini"
VOCABULARY: Final = 1024


def generate(folder: Path) -> None:
    """Write manifest, tokenizer and shards of the mini corpus into an existing folder."""
    with tempfile.TemporaryDirectory() as scratch:
        made = Path(scratch) / "mini"
        prepare([MINI / "text"], made, vocabulary=VOCABULARY)
        for file in made.iterdir():
            shutil.copyfile(file, folder / file.name)


if __name__ == "__main__":
    generate(MINI)
