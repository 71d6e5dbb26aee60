// Body of a function of (element, props, watch). Shows the pictures of its value,
// {pictures: [{src, caption, name, parameters}]}; keeps the newest `props.kept`, or only the last ones.
const root = element.querySelector(".pictures");

function figure(picture) {
  const node = document.createElement("figure");
  const link = document.createElement("a");
  Object.assign(link, { href: picture.src, download: picture.name });
  link.append(Object.assign(new Image(), { src: picture.src, alt: picture.caption }));
  node.append(link, Object.assign(document.createElement("figcaption"), { textContent: picture.caption }));
  if (picture.parameters) {
    const details = document.createElement("details");
    const text = JSON.stringify(picture.parameters, null, 1);
    details.append(
      Object.assign(document.createElement("summary"), { textContent: "parameters" }),
      Object.assign(document.createElement("pre"), { textContent: text }),
    );
    node.append(details);
  }
  return node;
}

watch("value", () => {
  const figures = ((props.value || {}).pictures || []).map(figure);
  if (!props.kept) return root.replaceChildren(...figures);
  root.prepend(...figures);
  while (root.children.length > props.kept) root.lastElementChild.remove();
});
