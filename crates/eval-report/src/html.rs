//! A report as one self-contained HTML page: styles inline, plots as inline SVG, no scripts.

use std::fmt::Write;

use crate::error::Result;
use crate::format;
use crate::grid::{Grid, Head, command_line, facts, row_name};
use crate::report::{Report, Section};
use crate::row::{Role, Row};

const STYLE: &str = include_str!("page.css");

impl Report {
    /// The text of `report.html`.
    ///
    /// # Errors
    /// A plot that cannot be drawn.
    pub fn to_html(&self) -> Result<String> {
        let mut page = Page(String::new());
        page.report(self)?;
        Ok(page.0)
    }
}

/// Text that HTML shows as it is.
fn escape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '&' => out += "&amp;",
            '<' => out += "&lt;",
            '>' => out += "&gt;",
            '"' => out += "&quot;",
            '\'' => out += "&#x27;",
            _ => out.push(c),
        }
    }
    out
}

/// The page as far as it is written.
struct Page(String);

impl Page {
    fn put(&mut self, html: std::fmt::Arguments<'_>) {
        // Writing to a string does not fail.
        let _ = self.0.write_fmt(html);
        self.0.push('\n');
    }

    fn report(&mut self, report: &Report) -> Result<()> {
        self.put(format_args!(
            "<!doctype html>\n<html lang=\"en\">\n<head>\n<meta charset=\"utf-8\">\n\
             <meta name=\"viewport\" content=\"width=device-width, initial-scale=1\">\n\
             <meta name=\"color-scheme\" content=\"light dark\">\n<title>Evaluation report</title>\n\
             <style>\n{STYLE}</style>\n</head>\n<body>\n<header>\n<h1>Evaluation report</h1>"
        ));
        // Words stay whole where the line breaks.
        let words: Vec<String> = report
            .command
            .iter()
            .map(|word| command_line(std::slice::from_ref(word)))
            .map(|word| format!("<span>{}</span>", escape(&word)))
            .collect();
        self.put(format_args!("<pre><code>{}</code></pre>", words.join(" ")));
        let machine = &report.machine;
        self.facts(&[
            (
                "Processor",
                format!("{}, {} cores", machine.cpu, machine.cores),
            ),
            ("Memory", format::bytes(machine.memory_bytes)),
            ("Device", report.device.clone()),
            ("Threads", report.threads.to_string()),
            ("Seed", report.seed.to_string()),
            ("Version", report.version.clone()),
        ]);
        self.put(format_args!("</header>\n<main>"));
        let names = series_names(report);
        for section in &report.sections {
            self.section(section, &names)?;
        }
        self.put(format_args!("</main>\n</body>\n</html>"));
        Ok(())
    }

    fn section(&mut self, section: &Section, names: &[String]) -> Result<()> {
        let grid = Grid::new(section);
        let title = escape(&section.title);
        self.put(format_args!("<section>\n<h2>{title}</h2>"));
        if !section.prose.is_empty() {
            self.put(format_args!("<p>{}</p>", escape(&section.prose)));
        }
        let facts: Vec<(&str, String)> = facts(section).collect();
        if !facts.is_empty() {
            self.facts(&facts);
        }
        if !grid.rows.is_empty() {
            self.table(&grid, &title);
        }
        if !grid.notes.is_empty() {
            self.put(format_args!("<ul class=\"notes\">"));
            for note in &grid.notes {
                self.put(format_args!("<li>{}</li>", escape(note)));
            }
            self.put(format_args!("</ul>"));
        }
        if !section.plots.is_empty() {
            self.put(format_args!("<div class=\"plots\">"));
            for plot in &section.plots {
                self.put(format_args!(
                    "<figure>\n<figcaption>{}</figcaption>\n{}\n</figure>",
                    escape(&plot.title),
                    plot.svg(names)?
                ));
            }
            self.put(format_args!("</div>"));
        }
        for figure in &section.figures {
            self.put(format_args!(
                "<figure class=\"picture\">{}<figcaption>{}</figcaption></figure>",
                figure.svg,
                escape(&figure.caption)
            ));
        }
        for row in &section.rows {
            self.layers(row);
        }
        self.put(format_args!("</section>"));
        Ok(())
    }

    fn facts(&mut self, facts: &[(&str, String)]) {
        self.put(format_args!("<dl>"));
        for (name, value) in facts {
            self.put(format_args!(
                "<div><dt>{}</dt><dd>{}</dd></div>",
                escape(name),
                escape(value)
            ));
        }
        self.put(format_args!("</dl>"));
    }

    /// The per-layer detail of a row, folded away.
    fn layers(&mut self, row: &Row) {
        let Some(grid) = Grid::of_layers(row) else {
            return;
        };
        let title = format!("Layers of {}", escape(&row_name(row)));
        self.put(format_args!("<details>\n<summary>{title}</summary>"));
        self.table(&grid, &title);
        self.put(format_args!("</details>"));
    }

    /// A table that scrolls on its own; `label` is HTML already.
    fn table(&mut self, grid: &Grid, label: &str) {
        let cell = |tag: &str, head: &Head, text: &str| {
            let number = if head.numeric {
                " class=\"number\""
            } else {
                ""
            };
            let scope = if tag == "th" { " scope=\"col\"" } else { "" };
            format!("<{tag}{scope}{number}>{}</{tag}>", escape(text))
        };
        let heads: String = grid
            .heads
            .iter()
            .map(|head| cell("th", head, &head.title))
            .collect();
        self.put(format_args!(
            "<div class=\"scroll\" tabindex=\"0\" role=\"region\" aria-label=\"{label}\">\n<table>\n\
             <thead><tr>{heads}</tr></thead>\n<tbody>"
        ));
        for (i, (role, cells)) in grid.rows.iter().enumerate() {
            let role = match role {
                Role::Reference => "reference",
                Role::Control => "control",
                Role::Method => "",
            };
            let apart = if grid.is_apart(i) { "apart" } else { "" };
            let class = [role, apart].join(" ");
            let class = match class.trim() {
                "" => String::new(),
                class => format!(" class=\"{class}\""),
            };
            let cells: String = cells
                .iter()
                .zip(&grid.heads)
                .map(|(text, head)| cell("td", head, text))
                .collect();
            self.put(format_args!("<tr{class}>{cells}</tr>"));
        }
        self.put(format_args!("</tbody>\n</table>\n</div>"));
    }
}

/// Names of all series, in the order of their first plots: a name has the same colour in all plots of a report.
fn series_names(report: &Report) -> Vec<String> {
    let plots = report.sections.iter().flat_map(|section| &section.plots);
    let mut names: Vec<String> = Vec::new();
    for series in plots.flat_map(|plot| &plot.series) {
        if !names.contains(&series.name) {
            names.push(series.name.clone());
        }
    }
    names
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_cannot_break_out_of_text_or_attribute() {
        assert_eq!(
            escape(r#"<b> & "it's""#),
            "&lt;b&gt; &amp; &quot;it&#x27;s&quot;"
        );
    }
}
