//! In which line of a document each key stands.

use std::collections::BTreeMap;

use toml::Spanned;
use toml::de::{DeTable, DeValue, Error};

use super::syntax_fault;

/// Lines by path: `gate[1].checks`, and `gate[1].checks[0]` for the items of a list.
#[derive(Debug)]
pub struct Lines(BTreeMap<String, usize>);

impl Lines {
    /// Of a document.
    pub fn of(text: &str) -> Result<Lines, Error> {
        let (mut lines, starts) = (Lines(BTreeMap::new()), starts(text));
        lines.add_table("", DeTable::parse(text)?.get_ref(), &starts);
        Ok(lines)
    }

    /// The line of `path`, from 1; of what does not stand there, the line of what it would stand in. 0 for the whole.
    pub fn line(&self, path: &str) -> usize {
        let mut path = path;
        loop {
            if let Some(line) = self.0.get(path) {
                return *line;
            }
            match path.rfind(['.', '[']) {
                Some(end) => path = &path[..end],
                None => return 0,
            }
        }
    }

    fn add_table(&mut self, path: &str, table: &DeTable<'_>, starts: &[usize]) {
        for (key, value) in table {
            let name = if path.is_empty() { key.get_ref().to_string() } else { format!("{path}.{}", key.get_ref()) };
            self.0.insert(name.clone(), line_at(starts, key.span().start));
            self.add_value(&name, value, starts);
        }
    }

    fn add_value(&mut self, path: &str, value: &Spanned<DeValue<'_>>, starts: &[usize]) {
        match value.get_ref() {
            DeValue::Table(table) => self.add_table(path, table, starts),
            DeValue::Array(items) => {
                for (i, item) in items.iter().enumerate() {
                    let name = format!("{path}[{i}]");
                    self.0.insert(name.clone(), line_at(starts, item.span().start));
                    self.add_value(&name, item, starts);
                }
            }
            _ => {}
        }
    }
}

/// What is wrong with the syntax of `text`, and where.
pub fn with_line(text: &str, error: &Error) -> String {
    match error.span() {
        Some(span) => format!("line {}: {}", line_at(&starts(text), span.start), syntax_fault(error)),
        None => syntax_fault(error),
    }
}

/// The line that a fault begins with, if it does.
pub fn line_in(fault: &str) -> usize {
    let number = fault.strip_prefix("line ").and_then(|rest| rest.split_once(':'));
    number.and_then(|(number, _)| number.parse().ok()).unwrap_or(0)
}

fn starts(text: &str) -> Vec<usize> {
    std::iter::once(0).chain(text.match_indices('\n').map(|(at, _)| at + 1)).collect()
}

fn line_at(starts: &[usize], offset: usize) -> usize {
    starts.partition_point(|start| *start <= offset)
}
