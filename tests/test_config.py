"""Settings: changed by field, from text and from a header; a misspelt or mistyped one is refused."""

import dataclasses
import json

import pytest

from hrldm.cache import digest
from hrldm.config import changed, from_header, with_settings
from hrldm.train.config import Stage2
from study.profiles import get_profile

QUICK = get_profile("quick")


def test_a_change_concerns_its_field_only():
    other = changed(QUICK, histogram__weight=0.0, ldm__steps=7, mixed_precision="bf16")
    assert (other.histogram.weight, other.ldm.steps, other.mixed_precision) == (0.0, 7, "bf16")
    assert changed(other, histogram__weight=10.0, ldm__steps=1000, mixed_precision="no") == QUICK
    with pytest.raises(dataclasses.FrozenInstanceError):
        other.histogram.weight = 1.0


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("histogram.weight=0", "histogram.weight", 0.0),
        ("histogram.t_max=None", "histogram.t_max", None),
        ("histogram.t_max=300", "histogram.t_max", 300),
        ("unet.channels=32,64", "unet.channels", (32, 64)),
        ("downstream.retention=1,.5", "downstream.retention", (1, 0.5)),
        ("unet.linear_skip=False", "unet.linear_skip", False),
        ("autoencoder.source='my maisi.pt'", "autoencoder.source", "my maisi.pt"),
        ("mixed_precision=bf16", "mixed_precision", "bf16"),
    ],
)
def test_settings_are_read_from_text(text, path, value):
    found = with_settings(QUICK, f"  {text} ldm.steps=7")
    assert found.ldm.steps == 7 and type(found) is type(QUICK)
    for name in path.split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("histogram.wieght=0", r"unknown setting 'histogram.wieght'; known are bins, vector, .*weight"),
        ("histo.weight=0", r"unknown setting 'histo.weight'; known are .*histogram"),
        ("histogram.weight", r"'histogram.weight': give part.field=value"),
        ("histogram.weight=much", r"histogram.weight=much: give float"),
        ("ldm.steps=1.5", r"ldm.steps=1.5: give int"),
        ("unet.linear_skip=1", r"unet.linear_skip=1: give bool"),
        ("unet.channels=a,b", r"unet.channels=a,b: give tuple"),
        ("unet=3", r"unet=3"),
        ("unet.channels.first=3", r"unknown setting 'unet.channels.first'"),
        ("autoencoder.source='my", r"No closing quotation"),
    ],
)
def test_wrong_settings_are_named(text, said):
    with pytest.raises(ValueError, match=said):
        with_settings(QUICK, text)


@pytest.mark.parametrize("name", ["lamda", "histogram__wieght", "histogram", "name__x"])
def test_an_unknown_field_is_refused(name):
    with pytest.raises(ValueError, match="unknown setting|is a part|has no fields"):
        changed(QUICK, **{name: 0.0})


def test_a_digest_notices_its_parts_and_nothing_else():
    other = changed(QUICK, histogram__weight=1.0)
    assert digest(QUICK) != digest(other) and digest(QUICK.histogram) != digest(other.histogram)
    assert digest(QUICK.ldm, QUICK.unet, 3) == digest(other.ldm, other.unet, 3) != digest(other.ldm, other.unet, 4)


def test_a_header_gives_the_settings_back_whatever_a_later_version_adds():
    config = Stage2(**{f.name: getattr(get_profile("paper"), f.name) for f in dataclasses.fields(Stage2)})
    stored = json.loads(json.dumps(dataclasses.asdict(config)))
    assert from_header(Stage2, stored) == config
    del stored["unet"]["mask_detail"]
    again = from_header(Stage2, stored | {"invented": 1})
    assert again == changed(config, unet__mask_detail=Stage2().unet.mask_detail)
