// Answers of /stats as they came, and what follows from them: rates, means and percentiles over a span of time.

const KEPT = 900 + 30; // seconds
const RATE_SPAN = 3;
const SHAPE_SPAN = 30;
const GAP = 6; // seconds without an answer after which a line is broken

// Interpolated within a bucket, as Prometheus does. counts are cumulative, the last one is of all; null without any.
export function quantile(share, bounds, counts) {
  const total = counts.length ? counts[counts.length - 1] : 0;
  if (!total) return null;
  const rank = share * total;
  const at = counts.findIndex((each) => each >= rank);
  if (at >= bounds.length) return bounds[bounds.length - 1];
  const below = at ? counts[at - 1] : 0;
  const start = at ? bounds[at - 1] : 0;
  return start + (bounds[at] - start) * ((rank - below) / (counts[at] - below || 1));
}

export class History {
  #samples = [];

  // False where the server was restarted since the last answer: what was before is forgotten.
  add(stats, now) {
    const last = this.#samples.at(-1);
    const restarted = last !== undefined && stats.time < last.stats.time;
    if (restarted) this.#samples = [];
    this.#samples.push({ stats, now });
    while (this.#samples[0].now < now - KEPT) this.#samples.shift();
    return !restarted;
  }

  get length() {
    return this.#samples.length;
  }

  // Seconds since 1970 of the first answer that is kept.
  get begun() {
    return this.#samples[0]?.now;
  }

  get latest() {
    return this.#samples.at(-1)?.stats;
  }

  // One point a sample, for all models or one.
  points(model, since) {
    const first = this.#samples.findIndex((sample) => sample.now >= since);
    const found = [];
    for (let index = Math.max(first, 0); index < this.#samples.length; index += 1) {
      const before = this.#samples[index - 1];
      const { now } = this.#samples[index];
      if (before && now - before.now > GAP) found.push({ now: before.now + 1 });
      found.push(this.#point(index, model));
    }
    return found;
  }

  point(model) {
    return this.#samples.length ? this.#point(this.#samples.length - 1, model) : undefined;
  }

  #point(index, model) {
    const { stats, now } = this.#samples[index];
    const models = chosen(stats, model);
    const recent = this.#earlier(index, RATE_SPAN);
    const old = this.#earlier(index, SHAPE_SPAN);
    const rate = (field) => growth(models, recent, model, field);
    const times = (field) => percentiles(shape(models, chosen(old, model), field));
    const batch = shape(models, chosen(old, model), "batch");
    const steps = batch.counts.at(-1);
    return {
      now,
      tokens: recent && rate("generated_tokens") / (stats.time - recent.time),
      computed: recent && rate("computed_tokens") / (stats.time - recent.time),
      running: sum(models, "running"),
      waiting: sum(models, "waiting"),
      kv: models.length ? Math.max(...models.map((each) => each.kv_usage)) : 0,
      ttft: times("ttft"),
      gap: times("gap"),
      batch: steps ? batch.sum / steps : null,
      gpus: stats.gpus,
    };
  }

  #earlier(index, span) {
    const latest = this.#samples[index].stats.time;
    let at = index;
    while (at > 0 && latest - this.#samples[at].stats.time < span) at -= 1;
    return at === index ? undefined : this.#samples[at].stats;
  }
}

export function chosen(stats, model) {
  return (stats?.models ?? []).filter((each) => !model || each.name === model);
}

export function sum(models, field) {
  return models.reduce((total, each) => total + each[field], 0);
}

function growth(models, before, model, field) {
  return Math.max(0, sum(models, field) - sum(chosen(before, model), field));
}

// What a distribution gained: of all these models together, which share their bounds.
function shape(models, before, field) {
  const known = new Map(before.map((each) => [each.name, each[field]]));
  const gained = { bounds: [], counts: [], sum: 0 };
  for (const model of models) {
    const { bounds, counts, sum: total } = model[field];
    const old = known.get(model.name) ?? { counts: [], sum: 0 };
    if (!known.has(model.name)) continue; // no earlier answer to compare with
    gained.bounds = bounds.length ? bounds : gained.bounds;
    counts.forEach((value, at) => {
      gained.counts[at] = (gained.counts[at] ?? 0) + Math.max(0, value - (old.counts[at] ?? 0));
    });
    gained.sum += total - old.sum;
  }
  return gained;
}

function percentiles({ bounds, counts }) {
  return [0.5, 0.95, 0.99].map((share) => quantile(share, bounds, counts));
}
