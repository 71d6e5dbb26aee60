"""Metrics, one file each: numpy float64 over features or maps, networks in Linen.

| file | figures | over |
|---|---|---|
| `fid` | Frechet distance: `fid`, or `fd_NETWORK` | features |
| `kid`, `mmd` | unbiased MMD with a cubic or Gaussian kernel, CMMD | features |
| `prdc` | precision, recall, density, coverage | features |
| `retrieval` | CLIP score, retrieval precision | paired embeddings |
| `lpips`, `images` | LPIPS; SSIM, PSNR | paired pictures |
| `agreement` | RMSE, sharpness, same verdicts | paired pictures |
| `edges`, `depth`, `masks` | edge F1, Hausdorff; depth error, order; IoU | paired maps |
| `scene_accuracy` | objects, style, background, relation | pictures of emoji scenes |

Feature networks: `features` (EfficientNet-Lite0, from a package), `inception`, `clip_features` and
`vgg` (by path), read by `weights`. `eval.measures` gives the metrics their names in `--metrics`.
Intervals: `bootstrap`, and the estimates of `mmd` and `fid` have their own.
"""
