// Small helpers over the document. Text becomes text nodes only, never markup.

export function byId(id) {
  return document.getElementById(id);
}

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") made.className = value;
    else if (name.includes("-") || name === "role" || name === "scope") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

// The colour that a custom property has now, resolved for a canvas.
export function colour(name) {
  const probe = element("span");
  probe.style.color = `var(${name})`;
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

export function fillSelect(select, values, label = (value) => value || "all") {
  const before = select.value;
  const known = [...select.options].map((option) => option.value);
  if (known.join("\n") === values.join("\n")) return;
  select.replaceChildren(...values.map((value) => element("option", { value, textContent: label(value) })));
  if (values.includes(before)) select.value = before;
}
