(() => {
  const data = JSON.parse(document.getElementById("attention-data").textContent);
  const unpack = (text) => Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
  const sides = { before: unpack(data.before), after: unpack(data.after) };
  const buttons = [...document.querySelectorAll("#attention .tokens button")];
  const [side, layer, head] = ["side", "layer", "head"].map((n) => document.getElementById("attention-" + n));
  const words = document.getElementById("attention-words");
  const size = (buttons.length * (buttons.length + 1)) / 2;
  let held = -1;
  let mean = [];

  const range = (chosen, count) => (chosen < 0 ? [...Array(count).keys()] : [chosen]);
  function choose() {
    const matrices = range(+layer.value, data.layers).flatMap((l) =>
      range(+head.value, data.heads).map((h) => (l * data.heads + h) * size));
    const bytes = sides[side.value];
    mean = Array.from({ length: size }, (_, i) =>
      matrices.reduce((sum, start) => sum + bytes[start + i], 0) / matrices.length / 255);
    show(held);
  }
  const at = (query, key) => mean[(query * (query + 1)) / 2 + key];
  function received(key) {
    let sum = 0;
    for (let query = key; query < buttons.length; query++) sum += at(query, key);
    return sum / buttons.length;
  }
  const name = (i) => "“" + buttons[i].textContent + "” at " + i;
  function show(query) {
    const shares = buttons.map((_, i) => (query < 0 ? received(i) : i <= query ? at(query, i) : 0));
    buttons.forEach((button, i) => {
      button.style.setProperty("--share", (100 * shares[i]).toFixed(1));
      button.classList.toggle("later", query >= 0 && i > query);
      button.setAttribute("aria-pressed", String(i === held));
    });
    const top = shares.map((share, i) => [share, i]).sort((a, b) => b[0] - a[0]).slice(0, 3)
      .map(([share, i]) => (100 * share).toFixed(0) + " % " + name(i));
    words.textContent = query < 0
      ? "Share of all attention that each token gets; most: " + top.join(", ") + "."
      : name(query) + " reads " + top.join(", ") + ".";
  }
  buttons.forEach((button, i) => {
    button.addEventListener("mouseenter", () => show(i));
    button.addEventListener("focus", () => show(i));
    button.addEventListener("mouseleave", () => show(held));
    button.addEventListener("blur", () => show(held));
    button.addEventListener("click", () => { held = held === i ? -1 : i; show(held); });
  });
  for (const control of [side, layer, head]) control.addEventListener("change", choose);
  choose();
})();
