"""Sizes of GPUs as the command plan takes them."""

import pytest
from spectraqlora.errors import InputError
from spectraqlora_pipelines.cli.plan import size


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GB", 24 * 10**9), ("24 GB", 24 * 10**9), ("24gb", 24 * 10**9), ("24G", 24 * 10**9),
        ("80GiB", 80 * 2**30), ("80Gi", 80 * 2**30), ("80gi", 80 * 2**30), ("0.7GB", 7 * 10**8),
        ("16384MiB", 2**34), ("1TB", 10**12),
    ],
)  # fmt: skip
def test_a_size_has_a_decimal_or_a_binary_unit(text: str, expected: int) -> None:
    assert size(text, "--gpu") == expected


@pytest.mark.parametrize(
    "text", ["lots", "24", "0GB", "-24GB", "24,5GB", "24 GB or so", "1.2.3GB", "GB", "24XB", "∞GB"]
)
def test_what_is_no_size_is_refused_in_one_line(text: str) -> None:
    with pytest.raises(InputError) as refused:
        size(text, "--gpu")
    assert str(refused.value) == f"--gpu: {text!r}: expected a size such as 24GB or 80GiB"
