"""The studies of ControlNet-XS (arXiv 2312.06573): `python -m eval.controlnet_xs`."""
