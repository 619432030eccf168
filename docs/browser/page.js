// The page: reads the form, asks the worker, and draws what it sends.
const form = document.querySelector("#sampler");
const find = (name) => form.querySelector(`[name="${name}"]`);
const [labels, status, strip] = ["labels", "status", "strip"].map((kind) => form.querySelector(`.${kind}`));
const picture = form.querySelector(".picture canvas");
const worker = new Worker(new URL("worker.js", import.meta.url), { type: "module" });
const state = { busy: false, id: 0 }; // also read by the test
window.sampler = state;

/** Draw gray pixels from -1 to 1. */
function draw(canvas, image, [height, width]) {
  canvas.width = width;
  canvas.height = height;
  const pixels = new ImageData(width, height);
  image.forEach((value, i) => pixels.data.set([...Array(3).fill(Math.round((value + 1) * 127.5)), 255], 4 * i));
  canvas.getContext("2d").putImageData(pixels, 0, 0);
}

function show(text) {
  status.textContent = text;
}

function setBusy(busy) {
  state.busy = busy;
  find("sample").hidden = busy;
  find("stop").hidden = !busy;
}

/** Ask for the chosen network; the answer starts the first sample. */
function open() {
  setBusy(false);
  form.classList.remove("ready");
  show("Loading the network ...");
  worker.postMessage({ open: find("network").value });
}

function start() {
  strip.replaceChildren();
  setBusy(true);
  show("Sampling ...");
  state.request = {
    id: ++state.id,
    network: find("network").value,
    label: Number(form.querySelector('[name="label"]:checked').value),
    seed: Number(find("seed").value) || 0,
    steps: Number(find("steps").value),
    guidance: Number(find("guidance").value),
    device: find("device").value,
  };
  worker.postMessage(state.request);
}

function showLabels(names) {
  const chosen = form.querySelector('[name="label"]:checked')?.value ?? names.indexOf("Ankle boot");
  labels.replaceChildren();
  for (const [number, name] of names.entries()) {
    const label = document.createElement("label");
    const input = Object.assign(document.createElement("input"), { type: "radio", name: "label", value: number });
    input.checked = number === Number(chosen);
    label.append(input, name);
    labels.append(label);
  }
}

worker.onmessage = ({ data }) => {
  if (data.error) {
    setBusy(false);
    show(`This browser cannot sample: ${data.error}`);
  } else if (data.properties) {
    if (data.network !== find("network").value) return; // another one was chosen meanwhile
    Object.assign(state, data);
    showLabels(data.properties.labels);
    find("steps").closest(".row").hidden = "timesteps" in data.properties;
    find("guidance").closest(".row").hidden = !data.properties.guided;
    find("device").closest(".row").hidden = !data.hasGpu;
    form.classList.add("ready");
    start();
  } else if (state.busy && data.id === state.id) {
    const done = data.step === data.steps;
    Object.assign(state, data);
    draw(picture, data.image, state.properties.size);
    const small = document.createElement("canvas");
    strip.append(small);
    draw(small, data.image, state.properties.size);
    show(`Step ${data.step} of ${data.steps}, ${Math.round(data.milliseconds)} ms`);
    form.querySelector("progress").value = data.step / data.steps;
    if (done) setBusy(false);
  }
};

form.addEventListener("submit", (event) => {
  event.preventDefault();
  if (form.classList.contains("ready") && !state.busy) start();
});
labels.addEventListener("change", start);
find("network").addEventListener("change", open);
find("device").addEventListener("change", start);
find("stop").addEventListener("click", () => {
  worker.postMessage({ stop: true });
  setBusy(false);
  show("Stopped");
});
find("another").addEventListener("click", () => {
  find("seed").value = Math.floor(Math.random() * 1e6);
  start();
});
for (const name of ["steps", "guidance"]) {
  const shown = find(name).parentElement.querySelector("output");
  find(name).addEventListener("input", () => (shown.textContent = find(name).value));
}
open();
