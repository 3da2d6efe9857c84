//! The loss curve as a picture: braille for the terminal, SVG for everything else.

use crate::Event;

/// Training loss (nats a token) and validation loss (bits a byte) by step.
#[derive(Debug, Default, Clone)]
pub struct Curve {
    pub train: Vec<(u64, f64)>,
    pub validation: Vec<(u64, f64)>,
}

impl Curve {
    /// Takes what concerns the curve. Steps that are told again (a resumed run) replace what was there.
    pub fn push(&mut self, event: &Event) {
        match event {
            Event::Step(s) => put(&mut self.train, s.step, s.loss),
            Event::Eval { step, bits_per_byte, .. } => put(&mut self.validation, *step, *bits_per_byte),
            _ => {}
        }
    }

    /// The training loss as `height` lines of braille, `width` characters each, with the range at the left.
    pub fn terminal(&self, width: usize, height: usize) -> Vec<String> {
        let columns = self.columns(width * 2);
        let Some((low, high)) = range(columns.iter().flatten().copied()) else {
            return Vec::new();
        };
        let mut dots = vec![vec![0u32; width]; height];
        for (x, value) in columns.iter().enumerate().filter_map(|(x, v)| v.map(|v| (x, v))) {
            let from_top = (high - value) / (high - low) * (height * 4 - 1) as f64;
            let y = (from_top.round() as usize).min(height * 4 - 1);
            dots[y / 4][x / 2] |= BRAILLE_BITS[y % 4][x % 2];
        }
        let label = |line: usize| match line {
            0 => format!("{high:5.2} "),
            l if l + 1 == height => format!("{low:5.2} "),
            _ => " ".repeat(6),
        };
        let draw = |cells: &Vec<u32>| -> String {
            cells.iter().map(|bits| char::from_u32(0x2800 + bits).unwrap_or(' ')).collect()
        };
        dots.iter().enumerate().map(|(line, cells)| label(line) + &draw(cells)).collect()
    }

    /// Both curves as a self-contained SVG document that follows the reader's dark or light setting.
    pub fn svg(&self, title: &str) -> String {
        let (low, high) = range(self.train.iter().chain(&self.validation).map(|p| p.1)).unwrap_or((0.0, 1.0));
        let last_step = self.train.last().or(self.validation.last()).map_or(1, |p| p.0).max(1);
        let place = |(step, value): (u64, f64)| {
            let x = LEFT + (WIDTH - LEFT - RIGHT) * step as f64 / last_step as f64;
            (x, TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low))
        };
        let line = |points: &[(u64, f64)], class: &str| {
            let path: Vec<String> =
                points.iter().map(|p| place(*p)).map(|(x, y)| format!("{x:.1},{y:.1}")).collect();
            format!("<polyline class=\"{class}\" points=\"{}\"/>\n", path.join(" "))
        };
        let mut svg = format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\">\n\
             <title>{}</title>\n<style>{STYLE}</style>\n",
            escape(title)
        );
        for i in 0..=4 {
            let value = low + (high - low) * f64::from(i) / 4.0;
            let y = place((0, value)).1;
            let (x1, x2, text_x, text_y) = (LEFT, WIDTH - RIGHT, LEFT - 8.0, y + 4.0);
            svg += &format!("<line class=\"grid\" x1=\"{x1}\" x2=\"{x2}\" y1=\"{y:.1}\" y2=\"{y:.1}\"/>\n");
            svg += &format!("<text x=\"{text_x}\" y=\"{text_y:.1}\" text-anchor=\"end\">{value:.2}</text>\n");
        }
        svg += &line(&self.train, "train");
        svg += &line(&self.validation, "validation");
        let (legend_x, base) = (LEFT + 12.0, HEIGHT - 10.0);
        svg += &format!("<text x=\"{legend_x}\" y=\"20\">{}</text>\n", escape(title));
        svg += &format!(
            "<text x=\"{legend_x}\" y=\"{base}\"><tspan class=\"train-text\">— training loss, nats a token</tspan>  \
             <tspan class=\"validation-text\">— validation, bits a byte</tspan></text>\n"
        );
        let end_x = WIDTH - RIGHT;
        svg += &format!(
            "<text x=\"{end_x}\" y=\"{base}\" text-anchor=\"end\">step {last_step}</text>\n</svg>\n"
        );
        svg
    }

    /// The mean training loss of each of `n` equal spans of steps; `None` where a span holds no step.
    fn columns(&self, n: usize) -> Vec<Option<f64>> {
        let Some(last_step) = self.train.last().map(|p| p.0) else {
            return vec![None; n];
        };
        let mut sums = vec![(0.0, 0u32); n];
        for (step, value) in self.train.iter().filter(|p| p.1.is_finite()) {
            let column = (step.saturating_sub(1) as usize * n) / last_step.max(1) as usize;
            let sum = &mut sums[column.min(n - 1)];
            *sum = (sum.0 + value, sum.1 + 1);
        }
        sums.iter().map(|(sum, count)| (*count > 0).then(|| sum / f64::from(*count))).collect()
    }
}

const WIDTH: f64 = 760.0;
const HEIGHT: f64 = 360.0;
const LEFT: f64 = 56.0;
const RIGHT: f64 = 16.0;
const TOP: f64 = 32.0;
const BOTTOM: f64 = 36.0;
const STYLE: &str = "svg{background:#fff}text{font:12px system-ui,sans-serif;fill:#444}\
.grid{stroke:#ddd}polyline{fill:none;stroke-width:1.6}.train{stroke:#2f6fb3}.validation{stroke:#d9822b;stroke-width:2.4}\
.train-text{fill:#2f6fb3}.validation-text{fill:#d9822b}\
@media(prefers-color-scheme:dark){svg{background:#16181c}text{fill:#bbb}.grid{stroke:#333}}";

/// The bit of each dot of a braille character, by row and column (Unicode chapter 21, block U+2800).
const BRAILLE_BITS: [[u32; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];

fn put(points: &mut Vec<(u64, f64)>, step: u64, value: f64) {
    while points.last().is_some_and(|p| p.0 >= step) {
        points.pop();
    }
    points.push((step, value));
}

/// The lowest and the highest finite value, apart by at least a little so that nothing divides by zero.
fn range(values: impl Iterator<Item = f64>) -> Option<(f64, f64)> {
    let (low, high) = values
        .filter(|v| v.is_finite())
        .fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| (low.min(v), high.max(v)));
    (low <= high).then(|| (low, high.max(low + 1e-3)))
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn falling() -> Curve {
        let train = (1..=100).map(|s| (s, 8.0 / s as f64)).collect();
        Curve { train, validation: vec![(50, 2.0), (100, 1.5)] }
    }

    #[test]
    fn the_terminal_curve_falls_from_left_to_right() {
        let lines = falling().terminal(20, 5);
        assert_eq!(lines.len(), 5);
        assert!(lines.iter().all(|l| l.chars().count() == 26), "{lines:#?}");
        let first = |line: &str| line.chars().nth(6);
        let last = |line: &str| line.chars().last();
        let blank = Some('\u{2800}');
        assert!(first(&lines[0]) != blank && last(&lines[0]) == blank, "{lines:#?}");
        assert!(first(&lines[4]) == blank && last(&lines[4]) != blank, "{lines:#?}");
    }

    #[test]
    fn nothing_to_draw_is_no_error() {
        assert!(Curve::default().terminal(10, 3).is_empty());
        assert!(Curve::default().svg("empty").contains("</svg>"));
        let one = Curve { train: vec![(1, f64::NAN)], validation: vec![] };
        assert!(one.terminal(10, 3).is_empty());
    }

    #[test]
    fn the_svg_holds_both_lines_and_an_escaped_title() {
        let svg = falling().svg("run <a> & b");
        assert!(svg.contains("run &lt;a&gt; &amp; b"));
        assert_eq!(svg.matches("<polyline").count(), 2);
    }

    #[test]
    fn steps_told_again_replace_the_old_ones() {
        let mut curve = falling();
        curve.push(&Event::Eval { step: 60, nats_per_token: 3.0, bits_per_byte: 1.9, parts: Vec::new() });
        assert_eq!(curve.validation, [(50, 2.0), (60, 1.9)]);
    }
}
