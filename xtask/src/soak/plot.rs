//! The picture of a soak test: requests in a second, the agent's memory, mappings and patches over time.

use super::Sample;
use anyhow::{Context, Result};
use plotters::prelude::*;
use std::path::Path;

const SIZE: (u32, u32) = (900, 720);

/// Writes it.
pub fn write(path: &Path, samples: &[Sample]) -> Result<()> {
    draw(path, samples).map_err(|error| anyhow::anyhow!("{error}")).with_context(|| format!("{}", path.display()))
}

type Line = (&'static str, Vec<(f64, f64)>);

fn draw(path: &Path, samples: &[Sample]) -> Result<(), Box<dyn std::error::Error>> {
    let mut rate = Vec::new();
    let (mut last_time, mut last_count) = (0.0, 0);
    for sample in samples {
        let (time, count) = (sample.seconds - last_time, sample.requests - last_count);
        rate.push((sample.seconds, if time > 0.0 { count as f64 / time } else { 0.0 }));
        (last_time, last_count) = (sample.seconds, sample.requests);
    }
    let of = |value: &dyn Fn(&Sample) -> f64| samples.iter().map(|sample| (sample.seconds, value(sample))).collect();
    let lines: [Line; 4] = [
        ("requests in a second", rate),
        ("agent's memory, MiB", of(&|sample| sample.agent_rss_kib as f64 / 1024.0)),
        ("mappings of the three first processes", of(&|sample| sample.mappings as f64)),
        ("patches in place", of(&|sample| sample.patches as f64)),
    ];
    let area = SVGBackend::new(path, SIZE).into_drawing_area();
    area.fill(&WHITE)?;
    let end = samples.last().map_or(1.0, |sample| sample.seconds);
    for (part, (title, points)) in area.split_evenly((lines.len(), 1)).iter().zip(lines) {
        let top = points.iter().map(|point| point.1).fold(1.0, f64::max) * 1.1;
        let mut chart = ChartBuilder::on(part)
            .caption(title, ("sans-serif", 14))
            .margin(6)
            .x_label_area_size(22)
            .y_label_area_size(60)
            .build_cartesian_2d(0.0..end, 0.0..top)?;
        chart.configure_mesh().y_labels(4).x_labels(8).x_desc("seconds").draw()?;
        chart.draw_series(LineSeries::new(points, &BLUE))?;
    }
    area.present()?;
    Ok(())
}
