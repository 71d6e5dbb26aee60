"""What `python -m eval.benchmark` times, by name.

Only the benchmark, a command above both `eval` and `train`, reads this.
"""

from eval import benchmark_control as controlled
from eval import benchmark_networks as networks
from eval import benchmark_operations as operations
from eval import benchmark_steps as steps
from eval.benchmark_pipeline import PixArtWithText

CASES = {
    "pixart_xl_256": networks.PixArt256,
    "pixart_xl_512": networks.PixArt,
    "pixart_xl_1024_text": PixArtWithText,
    "t5_xxl": networks.T5,
    "clip_text_l": networks.ClipText,
    "clip_text_h": networks.ClipTextH,
    "clip_text_bigg": networks.ClipTextBigG,
    "vae_decode_512": networks.VAEDecode,
    "unet_sd15_512": networks.UNet,
    "controlnet_xs_sd15_512": controlled.ControlNetXSUNet,
    "controlnet_sd15_512": controlled.ControlNetUNet,
    "operations_sd15_512": operations.UNetOperations,
    "operations_xl_512": operations.DiTOperations,
    "denoise_step_xl_512": steps.DenoiseStep,
    "lcd_step_xl_512": steps.LCDStep,
    "lcd_step_xl_512_deep": steps.LCDFullStep,
    "controlnet_xs_step_sd15_512": steps.ControlNetXSStep,
    "controlnet_xs_step_sd15_256": steps.ControlNetXSStep256,
    "controlnet_step_sd15_512": steps.ControlNetStep,
    "controlnet_shallow_step_sd15_512": steps.ControlNetShallowStep,
}
