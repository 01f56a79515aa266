//! The results as a picture: for each package, and for the paper, how many fixes went how.

use super::{
    outcome::{Outcome, Verdict},
    table::{self, Counts},
};
use anyhow::{Context, Result};
use plotters::prelude::*;
use std::path::Path;

const WIDTH: u32 = 900;
/// Height of a bar, and of what stands around them.
const BAR: u32 = 30;
const AROUND: u32 = 110;

/// Writes it.
pub fn write(path: &Path, outcomes: &[Outcome]) -> Result<()> {
    draw(path, outcomes).map_err(|error| anyhow::anyhow!("{error}")).with_context(|| format!("{}", path.display()))
}

fn colour(verdict: Verdict) -> RGBColor {
    match verdict {
        Verdict::Repaired => RGBColor(20, 90, 180),
        Verdict::InAndOut => RGBColor(120, 170, 225),
        Verdict::NoPatch => RGBColor(190, 190, 190),
        Verdict::Failed => RGBColor(230, 150, 40),
        Verdict::Broken => RGBColor(200, 30, 30),
    }
}

/// A bar: its name, and its parts in per cent.
type Row = (String, Vec<(Verdict, f64)>);

fn row(name: &str, counts: &Counts) -> Row {
    let parts = Verdict::ALL.iter().map(|&verdict| (verdict, table::share(counts.with(verdict), counts.all())));
    (format!("{name} ({} of {})", counts.patched(), counts.all()), parts.collect())
}

fn draw(path: &Path, outcomes: &[Outcome]) -> Result<(), Box<dyn std::error::Error>> {
    let counted: Vec<Outcome> = table::that_count(outcomes).cloned().collect();
    let mut rows: Vec<Row> =
        table::by_package(&counted).into_iter().map(|(name, own)| row(name, &Counts::of(own))).collect();
    rows.push(row("all", &Counts::of(&counted)));
    let (all, patched) = table::PAPER;
    let paper = [(Verdict::Repaired, table::share(patched, all)), (Verdict::NoPatch, table::share(all - patched, all))];
    rows.push((format!("the paper ({patched} of {all})"), paper.to_vec()));
    let height = AROUND + BAR * rows.len() as u32;
    let area = SVGBackend::new(path, (WIDTH, height)).into_drawing_area();
    area.fill(&WHITE)?;
    let mut chart = ChartBuilder::on(&area)
        .caption("Fixes that went into the live server, of those that change it", ("sans-serif", 18))
        .margin(10)
        .x_label_area_size(28)
        .build_cartesian_2d(-30.0..100.0, 0.0..rows.len() as f64 + 1.0)?;
    let labels = |value: &f64| if *value < 0.0 { String::new() } else { format!("{value:.0} %") };
    chart.configure_mesh().disable_y_mesh().disable_y_axis().x_label_formatter(&labels).draw()?;
    for (index, (name, parts)) in rows.iter().enumerate() {
        let low = (rows.len() - 1 - index) as f64;
        let mut at = 0.0;
        for &(verdict, share) in parts.iter().filter(|part| part.1 > 0.0) {
            let bar = Rectangle::new([(at, low + 0.12), (at + share, low + 0.88)], colour(verdict).filled());
            chart.draw_series([bar])?;
            at += share;
        }
        chart.draw_series([Text::new(name.clone(), (-29.5, low + 0.68), ("sans-serif", 14))])?;
    }
    let top = rows.len() as f64;
    for (index, verdict) in Verdict::ALL.into_iter().enumerate() {
        let at = index as f64 * 19.0;
        chart.draw_series([Rectangle::new([(at, top + 0.3), (at + 2.0, top + 0.7)], colour(verdict).filled())])?;
        let name = match verdict {
            Verdict::Repaired => "seen to work",
            verdict => verdict.words(),
        };
        chart.draw_series([Text::new(name, (at + 2.5, top + 0.7), ("sans-serif", 13))])?;
    }
    area.present()?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::{super::table::tests::outcome, *};
    use asap::patch::manifest::Class;

    #[test]
    fn a_picture_has_a_bar_for_each_package_and_the_paper() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("study.svg");
        let outcomes =
            [outcome("a", Verdict::Repaired, Class::CodeOnly), outcome("b", Verdict::Failed, Class::CodeOnly)];
        write(&path, &outcomes).expect("a picture");
        let text = std::fs::read_to_string(path).expect("text");
        for part in ["a (1 of 1)", "b (0 of 1)", "all (1 of 2)", "the paper (45 of 49)"] {
            assert!(text.contains(part), "{part}");
        }
    }
}
