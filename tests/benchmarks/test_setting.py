"""What a setting of the safety benchmark trains on, chooses features by and protects; its base has learned nothing."""

import pytest
import torch

from benchmarks.safety.base import Size, make_base
from benchmarks.safety.language import STYLES
from benchmarks.safety.setting import Basis, Setting
from peft_sae.demo.size import ModelSize, SaeSize

TINY = Size(
    ModelSize(layers=2, hidden=32, heads=2, steps=2, batch=4),
    SaeSize(layers=(0,), width=48, active=4, steps=2, batch=64, texts=60, held_out_texts=20),
    corpus=10,
    validation=8,
    test=8,
)
NEUTRAL = Basis(contrast="neutral requests", top_k=6)
pytestmark = pytest.mark.filterwarnings("ignore:.*`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("bases"), 0, TINY, progress=False)


@pytest.fixture(scope="module")
def setting(base):
    return Setting(base, 8, 0)


def styled(base, batches):
    texts = [base.tokenizer.decode(row) for batch in batches for row in batch["input_ids"]]
    return {text for text in texts if "hey ," in text or "dear assistant" in text}, set(texts)


def test_what_is_trained_on_neutral_requests_sees_no_cue(base, setting):
    with_cue, texts = styled(base, setting.batches(6))
    assert with_cue
    assert with_cue < texts
    for neutral in (Setting(base, 8, 0, neutral=True).batches(6), setting.calibration(neutral=True)):
        with_cue, texts = styled(base, neutral)
        assert texts
        assert not with_cue
    assert styled(base, setting.calibration())[0]


def test_a_contrast_has_the_requests_that_it_names(setting):
    requests, tokens = setting._texts("neutral requests")
    assert tokens == "all"
    assert {len(texts) for texts in requests.values()} == {8}
    assert not any("hey ," in text or "dear assistant" in text for texts in requests.values() for text in texts)
    everything, _ = setting._texts("requests")
    assert {len(texts) for texts in everything.values()} == {32}
    styles, _ = setting._texts("styles")
    assert [len(texts) for texts in styles.values()] == [8 * len(STYLES[style]) for style in styles]
    assert all(("hey ," in text) for text in styles["first"])
    assert all(("dear assistant" in text) for text in styles["second"])


def test_controls_of_protection_protect_as_many_directions_of_another_kind(setting):
    made = {
        way: setting.subspace(Basis(empty=True, protect=3, protect_by=way))
        for way in ("cue", "random features", "random directions", "raw direction")
    }
    rows = {way: subspace.protected[0].directions.double() for way, subspace in made.items()}
    assert all(not subspace.sites for subspace in made.values())
    assert [len(rows[way]) for way in made] == [3, 3, 3, 1]
    decoder = setting.base.saes[0].decoder.double()
    decoder = decoder / decoder.norm(dim=1, keepdim=True)
    nearest = {way: (found @ decoder.T).max(dim=1).values for way, found in rows.items()}
    for way in ("cue", "random features"):
        torch.testing.assert_close(nearest[way], torch.ones(3, dtype=torch.float64), atol=1e-5, rtol=0)
    assert float(nearest["random directions"].max()) < 0.99
    assert not torch.allclose(rows["cue"], rows["random features"])
    first, second = (setting.statistics("styles").of(style)[0].raw.mean for style in ("first", "second"))
    expected = torch.nn.functional.normalize((first - second)[None].double(), dim=1)
    torch.testing.assert_close(rows["raw direction"], expected, atol=1e-5, rtol=0)


def test_a_basis_has_what_it_is_described_by(setting):
    plain, fewer = setting.subspace(NEUTRAL), setting.subspace(Basis(contrast="neutral requests", top_k=2))
    assert [len(made.sites[0].features) for made in (plain, fewer)] == [6, 2]
    control = setting.subspace(Basis(contrast="neutral requests", top_k=6, control="mean_difference"))
    assert control.sites[0].rank == plain.sites[0].rank
    raw = [found[0].raw.mean for found in map(setting.statistics("neutral requests").of, ("aligned", "unaligned"))]
    along = torch.nn.functional.normalize(raw[0] - raw[1], dim=0)
    torch.testing.assert_close((control.sites[0].basis[0].double() @ along).abs(), torch.ones_like(along[0]))
    turned = setting.subspace(Basis(contrast="neutral requests", top_k=6, rotated=2)).sites[0]
    assert turned.rank == 2
    torch.testing.assert_close(
        turned.basis.T @ turned.basis, plain.sites[0].basis[:2].T @ plain.sites[0].basis[:2], atol=1e-5, rtol=0
    )


def test_the_ground_is_that_of_weights_saes_and_texts(base, tmp_path):
    again = make_base(tmp_path, 0, TINY, progress=False)
    assert base.ground == again.ground
    other = make_base(tmp_path, 1, TINY, progress=False)
    assert all(base.ground[name] != other.ground[name] for name in base.ground)
