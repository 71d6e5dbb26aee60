"""The studies of eDiff-I on the embedded world (arXiv 2211.01324): `python -m eval.ediffi`."""
