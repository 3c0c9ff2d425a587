// Numbers for people.

export const NONE = "–";

export function count(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  if (value >= 1e6) return `${(value / 1e6).toFixed(value < 1e7 ? 2 : 1)}M`;
  if (value >= 1e4) return `${(value / 1e3).toFixed(1)}k`;
  if (value >= 100 || Number.isInteger(value)) return Math.round(value).toLocaleString("en");
  return String(Number(value.toFixed(value < 10 ? 2 : 1)));
}

export function seconds(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  if (value === 0) return "0";
  if (value >= 99.5) return `${Math.round(value)} s`;
  if (value >= 1) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
  const ms = value * 1000;
  return `${ms.toFixed(ms < 10 ? 1 : 0)} ms`;
}

export function share(value) {
  if (value == null || !Number.isFinite(value)) return NONE;
  return `${(value * 100).toFixed(value > 0 && value < 0.0995 && (value * 100) % 1 ? 1 : 0)} %`;
}

// Of a day: 14:05, or with seconds.
export function clock(unixSeconds, withSeconds) {
  const date = new Date(unixSeconds * 1000);
  const parts = [date.getHours(), date.getMinutes(), ...(withSeconds ? [date.getSeconds()] : [])];
  return parts.map((part) => String(part).padStart(2, "0")).join(":");
}

export function bytes(value) {
  if (!value) return NONE;
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${value.toFixed(value < 10 && unit ? 1 : 0)} ${units[unit]}`;
}
