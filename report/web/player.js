// All clips in step: there is one frame number, and every canvas in sight is drawn from it. The frames of a clip lie side by
// side in one lossless picture (pages.sheet), so what is shown is exact, and no video codec is asked for.
"use strict";
{
  const $ = id => document.getElementById(id);
  const { sheets, given, frames, fps, width, height, columns } = JSON.parse($("sheets").textContent);
  const player = $("player"), play = $("play"), slider = $("frame"), where = $("where"), speed = $("speed");
  let frame = 0, playing = false, position = 0, last = 0;

  const clips = [...document.querySelectorAll(".clip")].map((section, k) => ({
    section, sheet: sheets[k], image: null, ready: false, near: false,
    pens: [...section.querySelectorAll("canvas")].map(canvas => canvas.getContext("2d")) }));

  // the truth has all its frames, a sample those after the given ones, which are the truth's
  const place = (track, t) => track === 0 || t < given ? t : frames + (track - 1) * (frames - given) + t - given;

  function draw(clip) {
    if (!clip.ready || !clip.near) return;
    clip.pens.forEach((pen, track) => {
      const at = place(track, frame);
      pen.drawImage(clip.image, at % columns * width, Math.floor(at / columns) * height, width, height, 0, 0, width, height);
    });
    clip.section.dataset.frame = frame + 1;
  }

  async function approach(clip) {
    if (!clip.image) {
      clip.image = new Image();
      clip.image.src = clip.sheet;
      await clip.image.decode();
      clip.ready = true;
    }
    draw(clip);
  }

  function show(t) {
    frame = t;
    const phase = t < given ? "given" : "forecast";
    const words = `frame ${t + 1} of ${frames}: ` + (t < given ? "given" : `forecast ${t + 1 - given} of ${frames - given}`);
    player.dataset.phase = phase;
    where.textContent = words;
    slider.value = t + 1;
    slider.setAttribute("aria-valuetext", words);
    clips.forEach(draw);
  }

  function go(t) {
    position = (t + frames) % frames;
    show(position);
  }

  function set(on) {
    if (on && !playing) requestAnimationFrame(now => { last = now; tick(now); });
    playing = on;
    play.textContent = on ? "❚❚ Pause" : "▶ Play";
  }

  function tick(now) {
    if (!playing) return;
    position = (position + Math.min(now - last, 500) / 1000 * fps * speed.value) % frames;
    last = now;
    if (Math.floor(position) !== frame) show(Math.floor(position));
    requestAnimationFrame(tick);
  }

  play.addEventListener("click", () => set(!playing));
  slider.addEventListener("input", () => { set(false); go(slider.value - 1); });
  for (const [id, step] of [["back", -1], ["next", 1]]) $(id).addEventListener("click", () => { set(false); go(frame + step); });
  document.addEventListener("keydown", event => {
    if (event.ctrlKey || event.altKey || event.metaKey || event.target.closest("select, summary, a, [tabindex]")) return;
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (event.key === " " && !event.target.closest("button")) set(!playing);
    else if (step && event.target !== slider) { set(false); go(frame + step); }
    else return;
    event.preventDefault();
  });

  const sight = new IntersectionObserver(changes => {
    for (const { target, isIntersecting } of changes) {
      const clip = clips.find(other => other.section === target);
      clip.near = isIntersecting;
      if (isIntersecting) approach(clip);
    }
  }, { rootMargin: "300px" });
  clips.forEach(clip => sight.observe(clip.section));
  show(0);
}
