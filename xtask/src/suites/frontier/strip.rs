//! A picture of a plan: a column for each site, a row each for width, bits and rank, and for the cache where it counts.

use std::fmt::Write;

use eval_report::Figure;
use frontier::{Plan, SitePlan};

const LEFT: f64 = 60.0;
const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 26.0;
const TOP: f64 = 8.0;

/// What a row shows of a site, from 0 to 1.
type Value<'v> = &'v dyn Fn(&SitePlan) -> f64;

/// The picture of a plan.
pub(super) fn figure(plan: &Plan, bf16: u64) -> Figure {
    let most_bits = plan.sites.iter().map(|site| site.bits).fold(1.0, f64::max);
    let most_rank = plan
        .sites
        .iter()
        .map(|site| site.treatment.rank)
        .max()
        .unwrap_or(0)
        .max(1);
    let share = |site: &SitePlan| site.share;
    let bits = |site: &SitePlan| site.bits / most_bits;
    let rank = |site: &SitePlan| site.treatment.rank as f64 / most_rank as f64;
    let most_cache = plan.sites.iter().map(|site| site.cache_bytes).max();
    let most_cache = most_cache.unwrap_or(0);
    let cache = |site: &SitePlan| site.cache_bytes as f64 / most_cache as f64;
    let mut rows: Vec<(&str, Value<'_>)> =
        vec![("width", &share), ("bits", &bits), ("rank", &rank)];
    if most_cache > 0 {
        rows.push(("cache", &cache));
    }
    let height = TOP + rows.len() as f64 * (HEIGHT + 4.0) + 20.0;
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {} {height}\" font-family=\"sans-serif\" \
         font-size=\"11\">",
        LEFT + WIDTH
    );
    let step = WIDTH / plan.sites.len().max(1) as f64;
    for (row, (name, value)) in rows.iter().enumerate() {
        let y = TOP + row as f64 * (HEIGHT + 4.0);
        let middle = y + HEIGHT / 2.0 + 4.0;
        write!(svg, "<text x=\"4\" y=\"{middle:.1}\">{name}</text>").ok();
        for (i, site) in plan.sites.iter().enumerate() {
            // Dark where much stays.
            let light = 95.0 - 65.0 * value(site).clamp(0.0, 1.0);
            let x = LEFT + i as f64 * step;
            write!(
                svg,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{HEIGHT}\" fill=\"hsl(210 60% {light:.0}%)\">\
                 <title>{}: {}, {:.2} bits</title></rect>",
                (step - 1.0).max(0.5),
                site.site,
                site.treatment,
                site.bits
            )
            .ok();
        }
    }
    write!(
        svg,
        "<text x=\"{LEFT}\" y=\"{:.1}\">sites in the order of the data: embedding, attention and MLP or experts of each block</text></svg>",
        height - 6.0
    )
    .ok();
    Figure {
        caption: format!(
            "The joint plan at {:.1} % of the model in bf16. Dark: much stays. Bits are shown as a share of {most_bits:.1} per \
             weight, ranks of {most_rank}{}.",
            100.0 * plan.budget as f64 / bf16.max(1) as f64,
            match most_cache {
                0 => String::new(),
                most => format!(", caches of {most} bytes"),
            }
        ),
        svg,
    }
}
