/** The geometry of the training curve, apart from how it is drawn. */

export type XY = { x: number; y: number };
export type Scale = { min: number; max: number; ticks: number[] };

/** A round scale that holds all values, with about `n` ticks. */
export function scale(values: number[], n: number): Scale {
  const finite = values.filter(Number.isFinite);
  let min = Math.min(...finite);
  let max = Math.max(...finite);
  if (finite.length === 0) [min, max] = [0, 1];
  if (max - min < 1e-9) [min, max] = [min - 0.5, max + 0.5];
  const rough = (max - min) / n;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough) ?? rough;
  const first = Math.floor(min / step);
  const last = Math.ceil(max / step);
  const ticks = Array.from({ length: last - first + 1 }, (_, i) => Number(((first + i) * step).toPrecision(10)));
  return { min: first * step, max: last * step, ticks };
}

export const place = (value: number, { min, max }: Scale, from: number, to: number) =>
  from + ((value - min) / (max - min)) * (to - from);

export const path = (points: XY[]) =>
  points.map(({ x, y }, i) => `${i ? 'L' : 'M'}${x.toFixed(1)} ${y.toFixed(1)}`).join('');

/** A moving mean over a twentieth of the points: the trend under the noise. */
export function smooth(values: number[]): number[] {
  const reach = Math.floor(values.length / 40);
  return values.map((_, i) => {
    const near = values.slice(Math.max(0, i - reach), i + reach + 1);
    return near.reduce((a, b) => a + b, 0) / near.length;
  });
}

export const short = (n: number) => (n >= 1e6 ? `${n / 1e6}M` : n >= 1e4 ? `${n / 1e3}k` : String(n));
