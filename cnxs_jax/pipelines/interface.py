"""What every pipeline is to those who use one: a call, sizes and defaults, a layout on disk."""

from typing import Any, ClassVar, NamedTuple

from cnxs_jax.pipelines import request as requests

# Arguments of a call that need a part, and their defaults.
CONTROL = {
    "image": None,
    "controlnet_conditioning_scale": 1.0,
    "control_guidance_start": 0.0,
    "control_guidance_end": 1.0,
}
STYLE = {"style_image": None, "style_scale": None}


class Component(NamedTuple):
    """A network and its parameters."""

    module: Any
    params: Any


class Result(NamedTuple):
    """`images` (see `output_type`) and, for each image, the `parameters` that draw it again."""

    images: Any
    parameters: list


class TextToImage:
    """Text to image: `pipe(prompt, ...)` draws.

    Attributes:
        class_name: the name in model_index.json.
        controllers: what is attached to the denoiser; a call takes their control pictures.
        styled: whether a call takes a reference picture, for which it needs `style_part`.
        multiple: what the sides in pixels must be multiples of.
        guidance_is_input: whether the network itself takes the guidance scale, in one evaluation.
    """

    class_name: ClassVar[str]
    controllers = ()
    styled = False
    style_part = "an image encoder"
    multiple = 1
    guidance_is_input = False

    def __call__(
        self,
        prompt,
        negative_prompt=None,
        image=None,
        num_inference_steps=None,
        guidance_scale=None,
        controlnet_conditioning_scale=1.0,
        control_guidance_start=0.0,
        control_guidance_end=1.0,
        word_masks=None,
        style_image=None,
        style_scale=None,
        height=None,
        width=None,
        num_images_per_prompt=1,
        seed=0,
        latents=None,
        output_type="pil",
    ):
        """Draws pictures.

        Args:
            prompt: a text or a list of texts, at most 2000 characters each; "" is unconditional.
            negative_prompt: a text, or one a prompt, that takes the unconditional half's place.
            image: with a controller, its control picture or a list of them, see `control.check`;
                for several controllers a list with one of these each.
            controlnet_conditioning_scale: factor on what the controller adds. 0 is no control,
                but for a ControlNet-XS with a learned time embedding computed as diffusers does,
                of which the embedding stays (`cnxs_jax.control.controlnet_xs`).
            control_guidance_start, control_guidance_end: the controller acts on steps i of n with
                i/n >= start and (i+1)/n <= end. All three may be lists, one entry a controller.
            word_masks: {phrase of the prompt: mask [h,w] in [0,1] or (mask, weight)}, or a list of
                such dicts, one a prompt (`cnxs_jax.control.paint`). A mask of zeros is no painting.
            style_image: with an image encoder, a reference picture (PIL or [H,W,3]), or one a
                prompt (eDiff-I, section 4.2).
            style_scale: its own guidance weight v of eps_u + w (eps_c - eps_u) + v (eps_s - eps_c);
                None guides to text and style together with w.
            num_inference_steps: rows of the solver; the pipeline's default, 4 with LCM. A cascade
                takes this and guidance_scale for its base, or lists with one a stage.
            guidance_scale: w of eps_u + w (eps_c - eps_u) (Imagen, equation 2), off if w <= 1;
                the pipeline's default, 0 with LCM.
            height, width: pixels; the model's own unless given, with a controller its picture's.
            num_images_per_prompt: images of one prompt are neighbours in the result.
            seed: a number: image n uses fold_in(key(seed), n). A list has one entry an image:
                a number s stands for fold_in(key(s), 0), the first image of seed s, and a pair
                (s, n) for its image n. So a picture does not depend on its batch.
            latents: [B,h,w,C] standard normal noise to start from instead of the seed's.
            output_type: "pil" list, "np" float32 [B,H,W,3] in [0,1], "latent" [B,h,w,C].

        Returns:
            Result with `images` and `parameters`.

        Raises:
            ConfigError: a bad argument, before any device work.
            NumericsError: the networks' output is not finite.
        """
        given = locals()
        needed = (
            (CONTROL, self.controllers, "a controller"),
            (STYLE, self.styled, self.style_part),
        )
        for arguments, there, part in needed:
            if not there:
                why = f"this pipeline was loaded without {part}"
                requests.refuse_unused({name: given[name] for name in arguments}, arguments, why)
        return self._call(given)

    def _call(self, given):
        """The Result of a call's arguments, by name."""
        raise NotImplementedError

    def defaults(self):
        """(steps, guidance scale) of a call that names none."""
        raise NotImplementedError

    def sizes(self, height, width):
        """((H, W) of the result, (H, W) that is drawn) for the sides asked for, None its own.

        Raises:
            ConfigError: sides that it does not draw.
        """
        raise NotImplementedError

    def contexts(self):
        """[(tokenizer, length)] of the tokens that the denoiser attends to."""
        raise NotImplementedError

    def write(self, directory, dtype=None):
        """Writes its layout into a new directory; `save_pipeline` calls it."""
        raise NotImplementedError

    @classmethod
    def read(cls, directory, dtype, compat=None, **parts):
        """The pipeline in `directory`; `load_pipeline` calls it.

        Args:
            compat: whose computation the stored controller follows, None where there is none.
            parts: those arguments of `load_pipeline` that are not named here, None if not given.

        Raises:
            ConfigError: parts that it does not take. CheckpointError: missing or damaged files.
        """
        raise NotImplementedError


def request_of(given, steps, guidance):
    """The `Request` of a call's arguments, with these numbers of steps and guidance."""
    return requests.check(
        prompt=given["prompt"],
        negative_prompt=given["negative_prompt"],
        steps=steps,
        guidance=guidance,
        height=given["height"],
        width=given["width"],
        repeats=given["num_images_per_prompt"],
        seed=given["seed"],
        latents=given["latents"],
        output_type=given["output_type"],
        word_masks=given["word_masks"],
    )
