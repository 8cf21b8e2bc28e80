"""The document that benchmarks of one model and one text read."""

from pathlib import Path

import pytest
import torch

from offload_runtime.bench.one_document import document


class Letters:
    """A token for each character, behind token 1."""

    def rest(self, text: str) -> torch.Tensor:
        return torch.tensor([ord(letter) for letter in text])

    def prefix(self, text: str) -> torch.Tensor:
        return torch.cat([torch.tensor([1]), self.rest(text)])


@pytest.mark.parametrize(("asked", "length"), [(40, 40), (99, 80)])
def test_a_piece_of_the_text_or_all_of_it(tmp_path: Path, asked: int, length: int) -> None:
    file = tmp_path / "text.txt"
    file.write_text("".join(map(chr, range(40, 120))), encoding="utf-8")
    ids = document(Letters(), file, asked)  # type: ignore[arg-type]
    assert ids[0] == 1
    assert ids[1:].tolist() == list(range(int(ids[1]), int(ids[1]) + length))
