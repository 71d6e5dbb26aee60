// Body of a function of (element, trigger, props). A canvas to paint on; its value is
// {picture: data URL or null, phrases: {colour: phrase}}. Pictures never leave the browser whole:
// they are drawn onto the canvas, which is small and knows no metadata.
const SIDE = 512;
const root = element.querySelector(".canvas");
const make = (parent, tag, attributes = {}) => {
  const node = Object.assign(document.createElement(tag), attributes);
  parent.append(node);
  return node;
};
const canvas = make(root, "canvas", { width: SIDE, height: SIDE });
canvas.setAttribute("aria-label", props.title);
const tools = make(root, "div", { className: "tools" });
const pen = canvas.getContext("2d");
const phrases = {};
const state = { used: false, colour: null, width: props.width, last: null };

function send() {
  const picture = state.used ? canvas.toDataURL("image/png") : null;
  props.value = { picture, phrases: { ...phrases } };
  trigger("input");
}

function wipe() {
  pen.fillStyle = props.background;
  pen.fillRect(0, 0, canvas.width, canvas.height);
  state.used = false;
}

function place(event) {
  const box = canvas.getBoundingClientRect();
  return [
    ((event.clientX - box.left) * canvas.width) / box.width,
    ((event.clientY - box.top) * canvas.height) / box.height,
  ];
}

function stroke(event) {
  const here = place(event);
  pen.strokeStyle = state.colour;
  pen.lineWidth = state.width;
  pen.lineCap = "round";
  pen.beginPath();
  pen.moveTo(...(state.last || here));
  pen.lineTo(...here);
  pen.stroke();
  state.last = here;
  state.used = true;
}

canvas.addEventListener("pointerdown", (event) => {
  if (state.colour === null) return; // a picture that is only shown
  canvas.setPointerCapture(event.pointerId);
  state.last = null;
  stroke(event);
});
canvas.addEventListener("pointermove", (event) => event.buttons && state.last && stroke(event));
for (const end of ["pointerup", "pointercancel"]) {
  canvas.addEventListener(end, () => {
    if (state.last === null) return;
    state.last = null;
    send();
  });
}

function choose(colour, button) {
  state.colour = colour;
  tools.querySelectorAll(".colour").forEach((other) => other.classList.remove("chosen"));
  button.classList.add("chosen");
}

for (const [colour, name] of Object.entries(props.colours)) {
  const row = make(tools, "div", { className: "row" });
  const button = make(row, "button", { type: "button", className: "colour", title: name });
  button.style.background = colour;
  button.onclick = () => choose(colour, button);
  if (state.colour === null) choose(colour, button);
  if (props.phrases) {
    const field = make(row, "input", { type: "text", placeholder: "phrase of the prompt" });
    field.setAttribute("aria-label", `what ${name} stands for`);
    field.maxLength = props.phrases;
    field.onfocus = () => choose(colour, button);
    field.oninput = () => {
      phrases[colour] = field.value;
      send();
    };
  }
}

const last = make(tools, "div", { className: "row" });
if (Object.keys(props.colours).length) {
  const brush = make(last, "input", { type: "range", min: 2, max: 128, value: state.width });
  brush.setAttribute("aria-label", "width of the brush");
  brush.oninput = () => (state.width = Number(brush.value));
}
make(last, "button", { type: "button", className: "clear", textContent: "Clear" }).onclick = () => {
  wipe();
  send();
};

if (props.upload) {
  const file = make(last, "input", { type: "file", accept: "image/png,image/jpeg,image/webp" });
  file.onchange = async () => {
    if (!file.files.length) return;
    try {
      const image = await createImageBitmap(file.files[0]);
      const scale = Math.max(canvas.width / image.width, canvas.height / image.height);
      const [width, height] = [image.width * scale, image.height * scale];
      wipe();
      pen.drawImage(image, (canvas.width - width) / 2, (canvas.height - height) / 2, width, height);
      state.used = true;
      send();
    } catch {
      alert("This file is no picture that the browser can read.");
    }
    file.value = "";
  };
}

// The canvas has the shape of the picture: "width x height" comes with the event.
document.addEventListener("picture-size", (event) => {
  const [width, height] = event.detail.split(" x ").map(Number);
  const scale = SIDE / Math.max(width, height);
  const [old, used] = [canvas.width ? canvas.toDataURL() : null, state.used];
  canvas.width = Math.round(width * scale);
  canvas.height = Math.round(height * scale);
  wipe();
  if (!used) return;
  const image = new Image();
  image.onload = () => {
    pen.drawImage(image, 0, 0, canvas.width, canvas.height);
    state.used = true;
    send();
  };
  image.src = old;
});

wipe();
