"""Boxes of a file to logits, compared with the published end-to-end run."""

import numpy as np
import torch

from mal_train.core.coco.annotations import read_coco
from mal_train.core.images.files import read_image
from mal_train.core.settings import Compat, LabelerConfig
from mal_train.core.size_class import network_size_class
from mal_train.kernel.convert.tao_import import from_tao
from mal_train.kernel.labeler.labeler import Labeler
from mal_train.kernel.labeler.types import Crop
from mal_train.kernel.networks.network import MalNetwork, normalize
from tests.mal_train.kernel.published import TAO, state_dict
from tests.reference import fixture


def test_windows_and_logits_equal_those_of_the_published_run() -> None:
    imported = from_tao(state_dict(TAO), "published")
    network = MalNetwork(imported.model).eval()
    network.load_state_dict(imported.weights)
    labeler = Labeler(network, LabelerConfig(crop_size=224, margin_rate=0.6, compat=Compat.TAO), precision="float32")
    coco = read_coco(fixture("k_e2e_boxes.json"))
    boxes = {annotation.id: annotation for annotation in coco.annotations}
    with np.load(fixture("k_e2e_logits.npz")) as stored:
        ids, windows, expected = stored["ids"].tolist(), stored["ext"].tolist(), stored["seg_logits"]
    crops: list[Crop] = []
    for number in ids:
        annotation = boxes[number]
        assert annotation.image_id is not None
        image = read_image(fixture("k_e2e_images") / coco.images[annotation.image_id].file_name)
        (crop,) = labeler.prepare(image, [annotation.box_xywh])
        assert isinstance(crop, Crop)
        crops.append(crop)
    assert [list(crop.window) for crop in crops] == windows
    x = normalize(torch.from_numpy(np.stack([crop.pixels for crop in crops])))
    size_class_N = torch.from_numpy(network_size_class([crop.area for crop in crops], Compat.TAO))
    with torch.inference_mode():
        logits = network.logits(x, size_class_N)
    np.testing.assert_allclose(logits.numpy(), expected, atol=1e-3, rtol=0)
