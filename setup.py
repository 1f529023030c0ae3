from pathlib import Path

from setuptools import find_packages, setup

recipe_packages = {"detector.recipes": "configs"}
for folder in sorted(p for p in Path("configs").rglob("*") if p.is_dir() and any(p.glob("*.yaml"))):
    if folder.name == "studies":  # what `tools/compare.py` reads: no recipes
        continue
    recipe_packages["detector.recipes." + ".".join(folder.relative_to("configs").parts)] = folder.as_posix()

setup(
    name="detector",
    version="0.1.0",
    description="Train object detectors on COCO-format data, and compare label-assignment strategies on equal terms.",
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=[*find_packages(include=["detector", "detector.*"]), *recipe_packages],
    package_dir=recipe_packages,
    package_data={name: ["*.yaml", "*.json"] for name in recipe_packages}
    | {"detector": ["py.typed", "lab/*.html", "lab/dataset/*.html"]},
    install_requires=[
        "albumentations>=2.0.8,<2.1",
        "defusedxml>=0.7.1",
        "hotcoco>=1.3,<2",
        "jinja2>=3.1",
        "matplotlib>=3.8",
        "msgspec>=0.19",
        "numpy>=2.0",
        "opencv-python-headless>=5",
        "pillow>=10",
        "psutil>=5.9",
        "pycocotools>=2.0.8",
        "pydantic>=2.10,<3",
        "pyyaml>=6",
        "rich>=13",
        "safetensors>=0.4",
        "scipy>=1.11",
        "simplejpeg>=1.8",
        "tensorboard>=2.17",
        "timm>=1.0.15,<2",
        "torch>=2.6",
        "torchvision>=0.21",
    ],
    extras_require={
        "ray": ["ray>=2.40"],
        "tiff": ["imagecodecs>=2024.1", "tifffile>=2024.1"],
        "test": [
            "hypothesis>=6.100",
            "imagecodecs>=2024.1",
            "mypy>=1.15",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "ruff>=0.9",
            "scikit-learn>=1.3",
            "selenium>=4.20",
            "tifffile>=2024.1",
            "types-PyYAML",
            "types-defusedxml",
        ],
    },
    entry_points={
        "console_scripts": [
            "detector-train=detector.cli.train:main",
            "detector-make-proposals=detector.cli.make_proposals:main",
            "detector-eval=detector.cli.eval:main",
            "detector-predict=detector.cli.predict:main",
            "detector-analyze-data=detector.cli.analyze_data:main",
            "detector-browse-data=detector.cli.browse_data:main",
            "detector-check-data=detector.cli.check_data:main",
            "detector-measure-data=detector.cli.measure_data:main",
            "detector-make-shapes=detector.cli.make_shapes:main",
            "detector-convert-data=detector.cli.convert_data:main",
            "detector-split-data=detector.cli.split_data:main",
            "detector-pseudo-label=detector.cli.pseudo_label:main",
            "detector-config=detector.cli.config:main",
            "detector-convert-weights=detector.cli.convert_weights:main",
            "detector-compare=detector.cli.compare:main",
            "detector-assignment=detector.cli.assignment:main",
        ]
    },
)
