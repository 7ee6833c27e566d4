const slider = document.getElementById("slider");
const before = document.getElementById("before");
slider.addEventListener("input", () => { before.style.clipPath = `inset(0 ${100 - slider.value}% 0 0)`; });
document.getElementById("pair").addEventListener("pointermove", (event) => {
  const box = event.currentTarget.getBoundingClientRect();
  slider.value = 100 * (event.clientX - box.left) / box.width;
  slider.dispatchEvent(new Event("input"));
});
