"""The page: its layout and its answers. Beside `server` the only module that needs gradio."""

import base64
import html
import logging
import pathlib

import gradio as gr

from cnxs_jax.demo import draw, inputs
from cnxs_jax.errors import ConfigError, NumericsError
from cnxs_jax.pipelines.images import png_bytes
from cnxs_jax.pipelines.request import MAX_PROMPT

HERE = pathlib.Path(__file__).parent
KEPT = 24  # pictures of the gallery; the browser holds them
BRUSH, PEN = 42, 10  # of 512: areas are painted, controllers have learned thin lines
LINES = {"#ffffff": "white", "#000000": "black"}
LOG = logging.getLogger(__name__)
CANVAS_STYLE = """
  .canvas { display: flex; gap: 12px; flex-wrap: wrap; }
  canvas { width: 256px; border: 1px solid #8888; touch-action: none; cursor: crosshair;
           align-self: flex-start; }
  .tools { display: flex; flex-direction: column; gap: 6px; }
  .row { display: flex; gap: 6px; align-items: center; flex-wrap: wrap; }
  .colour { flex: none; width: 24px; height: 24px; padding: 0; border-radius: 50%;
            border: 1px solid #8888; }
  .chosen { outline: 3px solid #8888; }
  .clear { padding: 2px 10px; border: 1px solid #8888; border-radius: 4px; }
  input[type=text] { width: 10em; padding: 2px 6px; border: 1px solid #8888; border-radius: 4px; }
"""
PICTURES_STYLE = """
  .pictures { display: flex; gap: 12px; flex-wrap: wrap; min-height: LEASTpx; }
  figure { margin: 0; width: WIDTHpx; }
  img { width: 100%; image-rendering: pixelated; }
  figcaption, details { font-size: 12px; }
  summary { cursor: pointer; }
  pre { font-size: 11px; white-space: pre-wrap; overflow-wrap: anywhere; }
"""


def page(studio):
    """The page of a `draw.Studio` as gradio's Blocks."""
    with gr.Blocks(title="cnxs_jax", analytics_enabled=False) as blocks:
        gr.Markdown("# cnxs_jax\nPictures from text, drawn on the machine that this page runs on.")
        with gr.Row():
            with gr.Column():
                fields = _texts(studio) | _numbers(studio)
                button = gr.Button("Draw", variant="primary", elem_id="draw")
                fields |= _painting()
                if studio.controlled:
                    fields |= _control(studio, fields["size"])
                if studio.styled:
                    fields |= _style()
            with gr.Column():
                now = _pictures("now", 0, 280, least=340)
                gr.Markdown("### Gallery\nEach file carries what it was made with.")
                gallery = _pictures("gallery", KEPT, 128)
        tell_size = "(label) => {document.dispatchEvent(new CustomEvent('picture-size', "
        fields["size"].change(None, fields["size"], js=tell_size + "{detail: label}));}")
        gr.on(
            [button.click, fields["prompt"].submit],
            _drawing(studio, list(fields)),
            list(fields.values()),
            [now, gallery],
            show_progress_on=now,
            api_name="draw",
        )
    return blocks


def _texts(studio):
    return {
        "prompt": gr.Textbox(label="Prompt", max_length=MAX_PROMPT, elem_id="prompt"),
        "negative_prompt": gr.Textbox(
            label="Negative prompt",
            info="what not to draw; needs guidance",
            max_length=MAX_PROMPT,
        ),
        "size": gr.Dropdown(list(studio.sizes), label="Size", elem_id="size"),
    }


def _numbers(studio):
    steps, guidance = studio.defaults[0]
    several = len(studio.models) > 1
    fields = {
        "steps": _slider("Teacher's steps" if several else "Steps", 1, inputs.MAX_STEPS, steps, 1),
        "guidance": _slider("Guidance", 0, inputs.MAX_GUIDANCE, guidance, 0.1),
    }
    if several:
        own = studio.defaults[1][0]
        fields["student_steps"] = _slider("Student's steps", 1, inputs.MAX_STEPS, own, 1)
    return fields | {"seed": gr.Number(0, label="Seed", precision=0, minimum=0)}


def _slider(label, low, high, value, step):
    return gr.Slider(low, high, min(value, high), step=step, label=label)


def _painting():
    with gr.Accordion("Paint phrases of the prompt", open=False, elem_id="paint"):
        canvas = _canvas("painting", "#ffffff", inputs.COLOURS, phrases=MAX_PROMPT)
        strength = _slider("Strength", 0, inputs.MAX_STRENGTH, inputs.STRENGTH, 0.1)
    return {"painting": canvas, "strength": strength}


def _control(studio, size):
    with gr.Accordion("Control picture", open=True):
        canvas = _canvas("control", "#000000", LINES, upload=True, width=PEN)
        kind = gr.Radio(list(inputs.HINTS), value=inputs.HINTS[0], label="The controller sees it")
        scale = _slider("Control scale", 0, inputs.MAX_CONTROL_SCALE, 1.0, 0.05)
        preview = _pictures("hint", 0, 160)
    gr.on(
        [canvas.input, kind.change, size.change],
        _preview(studio),
        [canvas, kind, size],
        preview,
        api_name="hint",
        show_progress="hidden",
        trigger_mode="always_last",
    )
    return {"control": canvas, "hint": kind, "control_scale": scale}


def _style():
    with gr.Accordion("Style picture", open=False):
        canvas = _canvas("style", "#ffffff", {}, upload=True)
        scale = _slider(
            "Style's own guidance, 0: with the text's", 0, inputs.MAX_STYLE_SCALE, 0, 0.1
        )
    return {"style": canvas, "style_scale": scale}


def _canvas(name, background, colours, upload=False, phrases=0, width=BRUSH):
    return gr.HTML(
        None,
        html_template='<div class="canvas"></div>',
        css_template=CANVAS_STYLE,
        apply_default_css=False,
        js_on_load=(HERE / "canvas.js").read_text(encoding="utf-8"),
        elem_id=name,
        title=f"canvas: {name}",
        background=background,
        colours=colours,
        upload=upload,
        phrases=phrases,
        width=width,
    )


def _pictures(name, kept, width, least=0):
    style = PICTURES_STYLE.replace("WIDTH", str(width)).replace("LEAST", str(least))
    return gr.HTML(
        None,
        html_template='<div class="pictures"></div>',
        css_template=style,
        apply_default_css=False,
        js_on_load=(HERE / "pictures.js").read_text(encoding="utf-8"),
        elem_id=name,
        kept=kept,
    )


def _drawing(studio, names):
    """The answer to the button: the pictures as they come, then all of them into the gallery."""

    def answer(progress=gr.Progress(), *values):  # noqa: B008  # how gradio passes its progress
        def tell(share, text):
            progress(share, desc=text)

        pictures = []
        try:
            form = inputs.Form(**dict(zip(names, values, strict=True)))
            for drawn in draw.draw(studio, form, tell):
                pictures.append(shown(drawn))
                yield {"pictures": pictures}, gr.skip()
        except Exception as error:
            refuse(error)
            yield gr.skip(), gr.skip()
        else:
            yield gr.skip(), {"pictures": pictures}

    return answer


def _preview(studio):
    """The answer to a stroke on the control canvas: what the controller is shown."""

    def answer(control, kind, size):
        try:
            form = inputs.Form(prompt="", size=size, control=control, hint=kind)
            image = draw.hint(form, studio.sizes[inputs.choice(size, studio.sizes, "size")])
        except Exception as error:
            refuse(error)
            return gr.skip()
        one = (
            []
            if image is None
            else [{"src": data_url(image), "caption": "hint", "name": "hint.png"}]
        )
        return {"pictures": one}

    return answer


def shown(drawn):
    """What the page is told of a picture; the file is the one that `cnxs_jax.sample` writes."""
    parameters = drawn.parameters
    compiled = " with compiling" if drawn.compiled else ""
    steps, seed = parameters["steps"], parameters["seed"]
    steps = " + ".join(map(str, steps)) if isinstance(steps, list) else steps  # of a cascade
    return {
        "src": data_url(drawn.image, parameters),
        "name": f"{drawn.role}_{seed}.png",
        "caption": f"{drawn.role}: {steps} steps, {drawn.seconds:.2f} s{compiled}, seed {seed}",
        "parameters": parameters,
    }


def data_url(image, parameters=None):
    """A PNG as text, so that the answer holds it and no file of the server is named."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image, parameters)).decode()


def refuse(error):
    """Tells the user what to mend; what is not the user's mistake stays on the server."""
    if isinstance(error, ConfigError | NumericsError):
        message = html.escape(str(error)[:600]).replace("\n", "<br>")
    else:
        LOG.error("internal error", exc_info=error)
        message = "internal error"
    gr.Warning(message)
