"""What several test files need. Without a GPU, the Triton kernels run in Triton's interpreter: it has to know before Triton is imported."""
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"

import data  # it imports torchvision, and that may import Triton


@pytest.fixture
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def cityscapes(tmp_path) -> Path:
    """One image of 60 x 40 pixels a split: road (raw id 7), two cars (26), a group of persons (24), and the ego vehicle (1), which is no class."""
    ids = np.full((40, 60), 7)
    ids[:9, :20], ids[10:20, :20], ids[:9, 30:], ids[35:] = 26000, 26001, 24, 1
    categories = [{"id": 7, "name": "road", "isthing": 0}, {"id": 24, "name": "person", "isthing": 1}, {"id": 26, "name": "car", "isthing": 1}]
    for split, city in (("train", "aachen"), ("val", "munster")):
        picture, fine, png = tmp_path / f"leftImg8bit/{split}/{city}", tmp_path / f"gtFine/{split}/{city}", tmp_path / f"gtFine/cityscapes_panoptic_{split}"
        for folder in (picture, fine, png):
            folder.mkdir(parents=True)
        name = f"{city}_000000_000019"
        Image.new("RGB", (60, 40)).save(picture / f"{name}_leftImg8bit.png")
        Image.fromarray(np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)).save(fine / f"{name}_gtFine_labelIds.png")
        Image.fromarray(np.where(ids < 1000, ids, ids // 1000).astype(np.uint8)).save(fine / f"{name}_gtFine_color.png")  # to be left alone
        data.save_ids(np.where(ids == 1, 0, ids), png / f"{name}_gtFine_panoptic.png")
        segments = [{"id": key, "category_id": key if key < 1000 else key // 1000, "iscrowd": int(key == 24)} for key in (7, 24, 26000, 26001)]
        (tmp_path / f"gtFine/cityscapes_panoptic_{split}.json").write_text(json.dumps({
            "images": [{"id": name, "file_name": f"{name}_gtFine_leftImg8bit.png", "width": 60, "height": 40}], "categories": categories,
            "annotations": [{"image_id": name, "file_name": f"{name}_gtFine_panoptic.png", "segments_info": segments}]}))
    return tmp_path
