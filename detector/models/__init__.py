"""Networks: images in, `Outputs` out.  `Model` is the union of all of them."""

from detector.models.dense import DenseConfig

Model = DenseConfig
