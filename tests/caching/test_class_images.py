"""Prior preservation: missing class images are painted by the base, once, and train as weighted regularisation."""

from __future__ import annotations

import pytest

from library import caching
from library.data.cached import open_cache
from library.models.base import Base
from tests.caching.conftest import EDIT

REST = """
with_prior_preservation = true
class_data_dir = "classes"
class_prompt = "a shape"
num_class_images = 3
sample_batch_size = 2
[training]
prior_loss_weight = 0.25
"""


def test_class_images_are_made_once_and_train_with_their_weight(pairs, configured, tmp_path, monkeypatch) -> None:
    run = configured(EDIT, "train_batch_size = 1", REST)
    assert caching.run(configured(EDIT, "train_batch_size = 1", REST, ("--dry_run",))) == 0
    assert not (tmp_path / "classes").exists()
    caching.run(run)
    made = sorted((tmp_path / "classes").iterdir())
    assert [path.name for path in made] == [f"class_{number:05}.png" for number in range(3)]
    assert len({path.read_bytes() for path in made}) == 3
    dataset = open_cache(run)
    assert [share.share for share in dataset.shares] == pytest.approx([0.5, 0.5])
    batches = [dataset.batch(position) for position in range(dataset.order.num_batches(0))]
    weights = {batch.item_keys[0].split("/")[0]: float(batch.loss_weight[0]) for batch in batches}
    assert weights == {"train_A": 1.0, "classes": 0.25}
    regular = next(batch for batch in batches if batch.item_keys[0].startswith("classes"))
    assert regular.condition.mask.min() == 1 and regular.captions == ("a shape",)
    before = [path.read_bytes() for path in made]
    monkeypatch.setattr(Base, "load_transformer", None)
    caching.run(run)
    monkeypatch.undo()
    made[1].unlink()
    caching.run(run)
    assert [path.read_bytes() for path in made] == before  # the same number gives the same image
