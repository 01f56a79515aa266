//! The comparison as a picture: bars on a logarithmic scale.

use super::{OnApache, OnWorkers};
use anyhow::{Context, Result};
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (900, 760);
/// Where all bars begin, ms.
const LEAST: f64 = 0.1;

/// Writes it.
pub fn write(path: &Path, workers: &[OnWorkers], servers: &[OnApache]) -> Result<()> {
    draw(path, workers, servers)
        .map_err(|error| anyhow::anyhow!("{error}"))
        .with_context(|| format!("{}", path.display()))
}

fn draw(path: &Path, workers: &[OnWorkers], servers: &[OnApache]) -> Result<(), Box<dyn std::error::Error>> {
    let of = |value: &dyn Fn(&OnWorkers) -> Option<f64>| -> Vec<(String, f64)> {
        workers.iter().filter_map(|row| Some((row.way.clone(), value(row)?))).collect()
    };
    let served = |value: &dyn Fn(&OnApache) -> f64| -> Vec<(String, f64)> {
        servers.iter().map(|row| (format!("{} ({} failed)", row.way, row.failed), value(row))).collect()
    };
    let parts = [
        ("256 threads: longest pause of a thread, ms", of(&|row| Some(row.pause_ms))),
        ("256 threads: from the command to new code in every thread, ms", of(&|row| row.until_all_ms)),
        ("Apache under load: longest time without an answer, ms; failed requests", served(&|row| row.gap_ms)),
    ];
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    for (part, (title, bars)) in area.split_evenly((parts.len(), 1)).iter().zip(parts) {
        let most = bars.iter().map(|bar| bar.1).fold(10.0, f64::max) * 30.0;
        let mut chart = ChartBuilder::on(part)
            .caption(title, ("sans-serif", 16))
            .margin(8)
            .x_label_area_size(28)
            .build_cartesian_2d((LEAST..most).log_scale(), 0.0..bars.len() as f64)?;
        chart.configure_mesh().disable_y_mesh().disable_y_axis().x_labels(6).draw()?;
        let count = bars.len();
        for (index, (name, value)) in bars.into_iter().enumerate() {
            let low = (count - 1 - index) as f64;
            let end = value.max(LEAST * 1.05);
            let colour = if name.starts_with("asap") { RGBColor(20, 90, 180) } else { RGBColor(170, 170, 170) };
            let bar = Rectangle::new([(LEAST, low + 0.15), (end, low + 0.85)], colour.filled());
            let text = Text::new(format!("{name}: {value:.1}"), (end * 1.1, low + 0.65), ("sans-serif", 14));
            chart.draw_series([bar])?;
            chart.draw_series([text])?;
        }
    }
    area.present()?;
    Ok(())
}
