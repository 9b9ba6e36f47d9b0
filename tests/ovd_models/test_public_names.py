import subprocess
import sys

import pytest

import ovd_models


def test_every_public_name_is_imported_at_its_first_use_only() -> None:
    program = (
        "import sys, ovd_models\n"
        "early = {'torch', 'ray', 'open_clip'} & set(sys.modules)\n"
        "assert not early, early\n"
        "assert set(ovd_models.__all__) <= set(dir(ovd_models))\n"
        "for name in ovd_models.__all__:\n"
        "    assert getattr(ovd_models, name) is not None, name\n"
        "assert 'torch' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_public_names_are_the_modules_own() -> None:
    from ovd_models import Vocabulary, vocabulary

    assert Vocabulary is vocabulary.Vocabulary
    assert ovd_models.load.__name__ == "load"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'unheard'"):
        _ = ovd_models.unheard  # type: ignore[attr-defined]
