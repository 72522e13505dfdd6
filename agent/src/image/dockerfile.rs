//! Reads a Dockerfile as far as section 4 needs it: which instructions its last stage is made of, each with its line. What only
//! the built image can tell is unknown, and never guessed.

use std::collections::BTreeMap;

use serde_json::json;
use sidewarden_proto::finding::{Evidence, Finding, Verdict};
use sidewarden_proto::time::Timestamp;

use crate::cis::Declared;
use crate::facts::engine::{Image, ImageInspect, Layer};
use crate::facts::{Hidden, Seen};

/// Largest file.
pub const MAX_FILE: u64 = 1 << 20;
/// Stages that are built upon each other are followed this far.
const MAX_HOPS: usize = 64;
/// Longest text that variables may make.
const MAX_EXPANDED: usize = 4096;

const BUILT: &str = "the built image: `sidewarden-agent image`";

/// One instruction.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Instruction {
    /// The line it begins on, from 1.
    line: usize,
    /// In capitals.
    word: String,
    rest: String,
    /// It stands behind ONBUILD: it is done when another image is built upon this one.
    on_build: bool,
}

/// A stage: what it is built upon, and its instructions.
#[derive(Clone, Debug)]
struct Stage {
    line: usize,
    from: String,
    name: String,
    instructions: Vec<Instruction>,
}

/// The findings of section 4 about the image that a Dockerfile makes. An error says what is wrong with the file.
pub fn judge(text: &str, declared: &Declared, now: Timestamp) -> Result<Vec<Finding>, String> {
    let stages = stages(text)?;
    let (base, instructions) = last(&stages)?;
    let image = image(&base, &instructions)?;
    let (user, health) = (image.inspect.config.user.clone(), image.inspect.config.healthcheck.is_some());
    let lines: Vec<usize> = instructions.iter().map(|i| i.line).collect();
    let mut findings = super::judge(image, &base, declared, now)?;
    for finding in &mut findings {
        finding.evidence.iter_mut().for_each(|evidence| placed(evidence, &lines));
        // An instruction that is not there may be in the base; nothing is in `scratch`.
        let inherited = match finding.check.as_str() {
            "user" => user.is_empty() && base != "scratch",
            "image-health" => !health && base != "scratch",
            "trusted-base" => finding.verdict == Verdict::Fail && base == "scratch",
            _ => false,
        };
        let built = ["trusted-base", "packages", "setuid-files", "user"].contains(&finding.check.as_str());
        match &mut finding.verdict {
            Verdict::Unknown { grant } if built && !grant.contains("configuration") => *grant = BUILT.into(),
            verdict if inherited => {
                *verdict =
                    Verdict::Unknown { grant: format!("{} in the Dockerfile, or {BUILT}", wanted(&finding.check)) };
                finding.evidence = vec![Evidence::new("Dockerfile", format!("it is not there, and may be in {base}"))];
            }
            _ => {}
        }
    }
    Ok(findings)
}

fn wanted(check: &str) -> &'static str {
    match check {
        "user" => "USER",
        "image-health" => "HEALTHCHECK",
        _ => "FROM",
    }
}

/// Evidence by number of entry becomes evidence by line.
fn placed(evidence: &mut Evidence, lines: &[usize]) {
    let Some(field) = evidence.source.strip_prefix("Docker API: ") else { return };
    let entry = evidence.line.strip_prefix("entry ").and_then(|rest| rest.split_once(':'));
    let line = entry.and_then(|(n, what)| Some((*lines.get(n.parse::<usize>().ok()?.checked_sub(1)?)?, what.trim())));
    *evidence = match line {
        Some((line, what)) => Evidence::new(format!("Dockerfile:{line}"), what),
        None => Evidence::new(format!("Dockerfile: {}", field.trim_start_matches("image: ")), evidence.line.clone()),
    };
}

/// The image that these instructions make on `base`. Its history begins with where the base comes from.
fn image(base: &str, instructions: &[Instruction]) -> Result<Image, String> {
    let (mut user, mut health, mut env, mut labels) = (String::new(), None, Vec::new(), serde_json::Map::new());
    for Instruction { line, word, rest, on_build } in instructions {
        match word.as_str() {
            // What only an image built upon this one gets mends nothing here.
            "USER" | "HEALTHCHECK" if *on_build => {}
            "USER" => user = rest.clone(),
            "HEALTHCHECK" => health = Some(healthcheck(rest).map_err(|why| format!("line {line}: {why}"))?),
            "ENV" | "ARG" => env.extend(pairs(rest).into_iter().map(|(name, value)| format!("{name}={value}"))),
            "LABEL" => labels.extend(pairs(rest).into_iter().map(|(name, value)| (name, json!(value)))),
            _ => {}
        }
    }
    let config =
        json!({"User": user, "Env": env, "Labels": labels, "Healthcheck": health.map(|test| json!({"Test": test}))});
    let repo_digests = if base == "scratch" { Vec::new() } else { vec![base.to_owned()] };
    let inspect = ImageInspect {
        id: String::new(),
        repo_digests,
        repo_tags: Vec::new(),
        created: String::new(),
        config: serde_json::from_value(config).map_err(|error| error.to_string())?,
    };
    let line = |i: &Instruction| Layer { created_by: created_by(i), size: 0 };
    let files = Seen::Hidden(Hidden::unclear("files of the image", "a Dockerfile alone is judged"));
    Ok(Image { inspect, history: instructions.iter().rev().map(line).collect(), files })
}

/// As the builder writes it into the history. Values of ENV, ARG and LABEL are judged by their names, not here.
fn created_by(i: &Instruction) -> String {
    match i.word.as_str() {
        "RUN" => format!("RUN {}", i.rest),
        "ENV" | "ARG" | "LABEL" => i.word.clone(),
        word => format!("{word} {}", i.rest),
    }
}

fn healthcheck(rest: &str) -> Result<Vec<String>, String> {
    let mut words = rest.split_whitespace().skip_while(|word| word.starts_with("--"));
    let kind = words.next().unwrap_or_default().to_ascii_uppercase();
    let command: Vec<String> = words.map(str::to_owned).collect();
    match (kind.as_str(), command.is_empty()) {
        ("NONE", true) | ("CMD", false) => Ok([vec![kind], command].concat()),
        _ => Err(format!("`HEALTHCHECK {}` is none", crate::watch::plain(rest))),
    }
}

/// `NAME=value other="more words"`, or the old form `NAME the rest`.
fn pairs(rest: &str) -> Vec<(String, String)> {
    let first = rest.split_whitespace().next().unwrap_or_default();
    if !first.contains('=') {
        let (name, value) = rest.split_once(char::is_whitespace).unwrap_or((rest, ""));
        return vec![(name.to_owned(), value.trim().to_owned())];
    }
    let (mut pairs, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = rest.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            ('\\', Some('"') | None) => word.extend(chars.next()),
            (c, Some(q)) if c == q => quote = None,
            ('"' | '\'', None) => quote = Some(c),
            (c, None) if c.is_whitespace() => take(&mut pairs, &mut word),
            _ => word.push(c),
        }
    }
    take(&mut pairs, &mut word);
    pairs
}

fn take(pairs: &mut Vec<(String, String)>, word: &mut String) {
    let word = std::mem::take(word);
    if let Some((name, value)) = word.split_once('=') {
        pairs.push((name.to_owned(), value.to_owned()));
    }
}

/// The base of the last stage, and every instruction between.
fn last(stages: &[Stage]) -> Result<(String, Vec<Instruction>), String> {
    let mut at = stages.last().ok_or("there is no FROM")?;
    let mut instructions = at.instructions.clone();
    for _ in 0..MAX_HOPS {
        let before = &stages[..stages.iter().position(|stage| std::ptr::eq(stage, at)).unwrap_or_default()];
        let Some(earlier) = before.iter().rev().find(|stage| stage.name.eq_ignore_ascii_case(&at.from)) else {
            // What the base brings is one entry of the history; an ADD that comes first makes a base of its own.
            let (line, rest) = (at.line, at.from.clone());
            let makes_none = instructions.first().is_some_and(|first| first.on_build);
            let from = Instruction { line, word: "FROM".into(), rest, on_build: false };
            let base = (at.from != "scratch" || makes_none).then_some(from);
            instructions.splice(0..0, base);
            return Ok((at.from.clone(), instructions));
        };
        instructions.splice(0..0, earlier.instructions.iter().cloned());
        at = earlier;
    }
    Err(format!("more than {MAX_HOPS} stages are built upon each other"))
}

fn stages(text: &str) -> Result<Vec<Stage>, String> {
    let (mut stages, mut arguments): (Vec<Stage>, BTreeMap<String, String>) = Default::default();
    for instruction in instructions(text)? {
        match (instruction.word.as_str(), stages.last_mut()) {
            ("FROM", _) => stages.push(from(&instruction, &arguments)?),
            ("ARG", None) if !instruction.on_build => {
                for (name, value) in pairs(&instruction.rest) {
                    let value =
                        expanded(&value, &arguments).map_err(|why| format!("line {}: {why}", instruction.line))?;
                    arguments.insert(name, value);
                }
            }
            (_, None) => return Err(format!("line {}: {} stands before any FROM", instruction.line, instruction.word)),
            (_, Some(stage)) => stage.instructions.push(instruction),
        }
    }
    if stages.is_empty() { Err("there is no FROM: this is no Dockerfile".into()) } else { Ok(stages) }
}

fn from(instruction: &Instruction, arguments: &BTreeMap<String, String>) -> Result<Stage, String> {
    let rest = expanded(&instruction.rest, arguments).map_err(|why| format!("line {}: {why}", instruction.line))?;
    let words: Vec<&str> = rest.split_whitespace().filter(|word| !word.starts_with("--")).collect();
    let name = match words[..] {
        [_, word, name] if word.eq_ignore_ascii_case("as") => name,
        [_] => "",
        _ => return Err(format!("line {}: `FROM {}` is none", instruction.line, crate::watch::plain(&rest))),
    };
    Ok(Stage { line: instruction.line, from: words[0].to_owned(), name: name.to_owned(), instructions: Vec::new() })
}

/// `$NAME`, `${NAME}` and `${NAME:-default}` by what ARG gives them.
fn expanded(text: &str, arguments: &BTreeMap<String, String>) -> Result<String, String> {
    let is_letter = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let (mut out, mut rest) = (String::new(), text);
    while let Some((before, after)) = rest.split_once('$') {
        out += before;
        let (inner, next) = match after.strip_prefix('{').and_then(|braced| braced.split_once('}')) {
            Some(braced) => braced,
            None => after.split_at(after.find(|c: char| !is_letter(c)).unwrap_or(after.len())),
        };
        let (name, default) = inner.split_once(":-").unwrap_or((inner, ""));
        if !name.chars().all(is_letter) || default.contains('$') {
            return Err(format!(
                "`${{{}}}` is not read: write `${{NAME}}` or `${{NAME:-default}}`",
                crate::watch::plain(inner)
            ));
        }
        let given = arguments.get(name).filter(|value| !value.is_empty());
        out += given.map_or(default, String::as_str);
        rest = next;
        if out.len() > MAX_EXPANDED {
            return Err(format!("what its variables make is longer than {MAX_EXPANDED} bytes"));
        }
    }
    Ok(out + rest)
}

/// Every instruction: comments left out, continued lines joined, the text of here-documents taken in.
fn instructions(text: &str) -> Result<Vec<Instruction>, String> {
    let escape = escape(text);
    let mut lines = (1..).zip(text.lines());
    let mut instructions = Vec::new();
    while let Some((line, first)) = lines.next() {
        let first = first.trim_start_matches('\u{feff}').trim();
        if first.is_empty() || first.starts_with('#') {
            continue;
        }
        let mut whole = first.to_owned();
        while let Some(continued) = continued(&whole, escape).map(str::to_owned) {
            // Empty lines and comments may stand between.
            let next =
                lines.by_ref().map(|(_, next)| next.trim()).find(|next| !next.is_empty() && !next.starts_with('#'));
            let Some(next) = next else {
                whole = continued;
                break;
            };
            whole = format!("{} {next}", continued.trim_end());
        }
        let mut instruction = instruction(line, &whole)?;
        if ["RUN", "COPY", "ADD"].contains(&instruction.word.as_str()) {
            for document in here_documents(&whole) {
                let text =
                    document.text(&mut lines).ok_or_else(|| format!("line {line}: its here-document has no end"))?;
                instruction.rest += &format!(" {text}");
            }
        }
        instructions.push(instruction);
    }
    Ok(instructions)
}

/// The line without its escape, where it goes on in the next one: an escape that is escaped is only itself.
fn continued(line: &str, escape: char) -> Option<&str> {
    line.strip_suffix(escape).filter(|before| !before.ends_with(escape))
}

fn instruction(line: usize, whole: &str) -> Result<Instruction, String> {
    let split = |text: &str| {
        let (word, rest) = text.split_once(char::is_whitespace).unwrap_or((text, ""));
        (word.to_ascii_uppercase(), rest.trim().to_owned())
    };
    let (mut word, mut rest) = split(whole);
    let on_build = word == "ONBUILD";
    if on_build {
        (word, rest) = split(&rest);
    }
    let known = [
        "FROM",
        "RUN",
        "CMD",
        "LABEL",
        "MAINTAINER",
        "EXPOSE",
        "ENV",
        "ADD",
        "COPY",
        "ENTRYPOINT",
        "VOLUME",
        "USER",
        "WORKDIR",
        "ARG",
        "STOPSIGNAL",
        "HEALTHCHECK",
        "SHELL",
    ];
    if on_build && ["", "ONBUILD", "FROM", "MAINTAINER"].contains(&word.as_str()) {
        return Err(format!("line {line}: `ONBUILD {word}` is none"));
    }
    if !known.contains(&word.as_str()) {
        return Err(format!("line {line}: `{}` is no instruction of a Dockerfile", crate::watch::plain(&word)));
    }
    Ok(Instruction { line, word, rest, on_build })
}

/// The character that continues a line: a backslash, unless a directive at the very beginning says otherwise.
fn escape(text: &str) -> char {
    for line in text.lines().map(str::trim) {
        let Some(directive) = line.strip_prefix('#') else { break };
        let Some((key, value)) = directive.split_once('=') else { break };
        if key.trim().eq_ignore_ascii_case("escape") {
            return value.trim().chars().next().filter(|c| *c == '`').unwrap_or('\\');
        }
    }
    '\\'
}

/// Lines that belong to an instruction, up to one that is `end`.
#[derive(Debug, PartialEq, Eq)]
struct HereDocument {
    end: String,
    /// Tabs in front of `end` do not count.
    is_indented: bool,
}

impl HereDocument {
    /// Its lines as one; `None` where they do not end.
    fn text<'a>(&self, lines: &mut impl Iterator<Item = (usize, &'a str)>) -> Option<String> {
        let mut text = Vec::new();
        for (_, line) in lines {
            if (if self.is_indented { line.trim_start_matches('\t') } else { line }) == self.end {
                return Some(text.join(" ; "));
            }
            text.push(line);
        }
        None
    }
}

/// The here-documents of an instruction: words that begin with `<<`, with nothing but a number in front.
fn here_documents(whole: &str) -> Vec<HereDocument> {
    let document = |word: String| {
        let (number, end) = word.split_once("<<")?;
        let is_one = number.chars().all(|c| c.is_ascii_digit()) && !end.contains('<');
        let bare = end.strip_prefix('-').unwrap_or(end);
        let (end, is_indented) = (bare.replace(['"', '\'', '\\'], ""), bare.len() < end.len());
        (is_one && !end.is_empty()).then_some(HereDocument { end, is_indented })
    };
    words(whole).into_iter().filter_map(document).collect()
}

/// The words of a shell's line, quotes kept; none where a quote has no end, as the builder has it.
fn words(line: &str) -> Vec<String> {
    let (mut words, mut word, mut quote) = (Vec::new(), String::new(), None);
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (c, quote) {
            (c, None) if c.is_whitespace() => words.push(std::mem::take(&mut word)),
            ('\\', Some('"') | None) => {
                word.push(c);
                word.extend(chars.next());
            }
            ('"' | '\'', None) => {
                quote = Some(c);
                word.push(c);
            }
            (c, open) => {
                quote = open.filter(|q| *q != c);
                word.push(c);
            }
        }
    }
    words.push(word);
    if quote.is_some() { Vec::new() } else { words }
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "\
# syntax=docker/dockerfile:1
ARG BASE=registry.example/base/debian@sha256:aa
FROM rust:1 AS build
RUN apt-get update
FROM ${BASE}
COPY --from=build /app /app
RUN apt-get update && \\
    # the list is of no use later
    apt-get install -y libpq5
USER 10001:10001
HEALTHCHECK --interval=5s CMD [\"/app\", \"health\"]
";

    fn verdicts(text: &str) -> BTreeMap<String, (String, String)> {
        let declared = Declared::default();
        let findings = judge(text, &declared, crate::cis::sample::NOW).unwrap();
        let told = |f: Finding| {
            let evidence = f.evidence.first().map(|e| format!("{}: {}", e.source, e.line)).unwrap_or_default();
            (f.check, (f.verdict.word().to_owned(), evidence))
        };
        findings.into_iter().map(told).collect()
    }

    fn check(text: &str, check: &str, verdict: &str, evidence: &str) {
        let all = verdicts(text);
        let (got, why) = &all[check];
        assert_eq!(got, verdict, "{check} of {text}: {why}");
        assert!(why.contains(evidence), "{check} of {text}: {why}");
    }

    #[test]
    fn a_sound_file_breaks_nothing_and_what_only_the_image_can_tell_is_unknown() {
        let all = verdicts(GOOD);
        let failing: Vec<_> = all.iter().filter(|(_, (verdict, _))| verdict == "fail").collect();
        assert!(failing.is_empty(), "{failing:?}");
        for known in ["user", "image-health", "add-instruction", "update-alone", "image-secrets"] {
            assert_eq!(all[known].0, "pass", "{known}: {}", all[known].1);
        }
        assert_eq!((all["setuid-files"].0.as_str(), all["packages"].0.as_str()), ("unknown", "unknown"));
    }

    #[test]
    fn each_rule_is_found_broken_on_its_line() {
        let with = |more: &str| format!("{GOOD}{more}\n");
        check(&with("ADD https://example.org/x /x"), "add-instruction", "fail", "Dockerfile:12");
        check(&with("run  apk   update"), "update-alone", "fail", "Dockerfile:12");
        check(&with("RUN <<EOF\napt-get update\nEOF\nRUN true"), "update-alone", "fail", "Dockerfile:12");
        check(&with("ENV A=1 DB_PASSWORD=\"hunter 2\""), "image-secrets", "fail", "DB_PASSWORD");
        check(&with("ENV API_TOKEN hunter2"), "image-secrets", "fail", "API_TOKEN");
        check(&with("RUN curl -H x ftp://me:hunter2@example.org"), "image-secrets", "fail", "Dockerfile:12");
        check(&with("USER 0"), "user", "fail", "`0`");
        check(&with("HEALTHCHECK NONE"), "image-health", "fail", "");
        check(&with("HEALTHCHECK --interval=5s none"), "image-health", "fail", "");
        check(&with("ONBUILD ADD . /srv"), "add-instruction", "fail", "Dockerfile:12");
        check(&with("onbuild run apt-get update"), "update-alone", "fail", "Dockerfile:12");
    }

    #[test]
    fn an_add_makes_a_base_only_where_there_is_none() {
        check("FROM debian\nADD x /x\n", "add-instruction", "fail", "Dockerfile:2");
        check("FROM scratch\nADD rootfs.tar /\n", "add-instruction", "pass", "");
        check("FROM scratch\nONBUILD ADD rootfs.tar /\n", "add-instruction", "fail", "Dockerfile:2");
    }

    #[test]
    fn what_an_image_built_upon_this_one_gets_mends_nothing_here() {
        check("FROM scratch\nONBUILD USER 7\n", "user", "fail", "");
        check("FROM debian\nONBUILD USER 7\n", "user", "unknown", "may be in debian");
        check("FROM scratch\nONBUILD HEALTHCHECK CMD true\n", "image-health", "fail", "");
        check("FROM scratch\nUSER 7\nONBUILD USER 0\n", "user", "pass", "`7`");
    }

    #[test]
    fn what_is_in_a_here_document_is_no_instruction_and_what_is_in_none_is_one() {
        let rows = [
            ("RUN cat <<EOF\nUSER 7\nEOF\n", "fail"),
            ("RUN cat <<EOF\n EOF\nUSER 7\nEOF\n", "fail"),
            ("RUN cat <<-EOF\nUSER 7\n\tEOF\n", "fail"),
            ("RUN cat <<'E-1'\nUSER 7\nE-1\n", "fail"),
            ("RUN cat 3<<A <<B\nUSER 7\nA\nUSER 8\nB\n", "fail"),
            ("ONBUILD RUN cat <<EOF\nUSER 7\nEOF\n", "fail"),
            ("RUN cat <<EOF\nx\nEOF\nUSER 7\n", "pass"),
            ("RUN echo x<<EOF\nUSER 7\n", "pass"),
            ("RUN cat <<<EOF\nUSER 7\n", "pass"),
            ("RUN echo 'a <<EOF'\nUSER 7\n", "pass"),
            ("RUN echo \"a <<EOF\"\nUSER 7\n", "pass"),
            ("RUN echo 1 \\<<EOF\nUSER 7\n", "pass"),
            ("CMD cat <<EOF\nUSER 7\n", "pass"),
            ("RUN echo a\\\\\nUSER 7\n", "pass"),
        ];
        for (text, expected) in rows {
            check(&format!("FROM scratch\n{text}"), "user", expected, "");
        }
    }

    #[test]
    fn what_may_be_in_the_base_is_unknown_and_nothing_is_in_scratch() {
        check("FROM debian\nCOPY a /a\n", "user", "unknown", "may be in debian");
        check("FROM debian\nCOPY a /a\n", "image-health", "unknown", "may be in debian");
        check("FROM scratch\nCOPY a /a\n", "user", "fail", "");
        check("FROM scratch\nCOPY a /a\n", "image-health", "fail", "");
        let stages =
            "FROM scratch AS base\nUSER 7\nENV X_SECRET=abc\nFROM other AS unused\nADD x /\nFROM base\nCOPY a /a\n";
        check(stages, "user", "pass", "`7`");
        check(stages, "image-secrets", "fail", "X_SECRET");
        check(stages, "add-instruction", "pass", "");
    }

    #[test]
    fn names_of_the_base_are_expanded() {
        let of = |from: &str| last(&stages(&format!("ARG A=x\nARG B\nFROM {from}\n")).unwrap()).unwrap().0;
        let rows =
            [("$A:1", "x:1"), ("${A}/y", "x/y"), ("${B:-z}", "z"), ("a$", "a"), ("--platform=linux/amd64 q", "q")];
        rows.iter().for_each(|(from, expected)| assert_eq!(of(from), *expected, "{from}"));
        let defaults = stages("ARG REGISTRY=registry.example\nARG BASE=$REGISTRY/base:1\nFROM ${BASE}\n").unwrap();
        assert_eq!(last(&defaults).unwrap().0, "registry.example/base:1");
    }

    #[test]
    fn a_base_with_a_tag_is_from_its_registry_and_one_with_a_digest_is_that_digest() {
        let verdict = |base: &str, trusted: &str| {
            let mut declared = Declared::default();
            declared.images.trusted = vec![trusted.into()];
            let text = format!("FROM {base}\nUSER 7\n");
            let findings = judge(&text, &declared, crate::cis::sample::NOW).unwrap();
            findings.into_iter().find(|f| f.check == "trusted-base").unwrap().verdict.word()
        };
        for (base, trusted, expected) in [
            ("registry.example/base:1", "registry.example/", "pass"),
            ("registry.example/base:1", "registry.example/base", "pass"),
            ("registry.example:5000/base", "registry.example:5000/", "pass"),
            ("registry.example:5000/base:1@sha256:aa", "registry.example:5000/base", "pass"),
            ("registry.example/base:1@sha256:aa", "sha256:aa", "pass"),
            ("debian:12", "docker.io/library/", "pass"),
            ("debian:12", "sha256:aa", "fail"),
            ("debian:registry.example", "registry.example/", "fail"),
        ] {
            assert_eq!(verdict(base, trusted), expected, "{base} {trusted}");
        }
    }

    #[test]
    fn another_escape_and_a_file_that_ends_early_are_read() {
        let windows = "# escape=`\nFROM scratch\nRUN apt-get update `\n  && apt-get install x\nUSER 7\n";
        check(windows, "update-alone", "pass", "");
        assert_eq!(instructions("FROM a\\").unwrap()[0].rest, "a");
        assert!(instructions("RUN <<EOF\nnever").unwrap_err().contains("line 1: its here-document has no end"));
    }

    #[test]
    fn what_is_no_dockerfile_says_why() {
        for (text, expected) in [
            ("", "no FROM"),
            ("RUN x\n", "line 1: RUN stands before"),
            ("FROM a\nhello there\n", "line 2: `HELLO`"),
            ("FROM a b c d\n", "line 1"),
            ("\u{0}\u{1}\u{2}", "no instruction"),
            ("FROM a\nONBUILD ONBUILD USER 7\n", "line 2: `ONBUILD ONBUILD`"),
            ("FROM a\nONBUILD FROM b\n", "line 2: `ONBUILD FROM`"),
            ("FROM a\nONBUILD\n", "line 2: `ONBUILD `"),
            ("FROM a\nHEALTHCHECK CMD\n", "line 2: `HEALTHCHECK CMD`"),
            ("FROM a\nHEALTHCHECK sometimes x\n", "line 2: `HEALTHCHECK sometimes"),
            ("ARG A=x\nFROM ${A:+evil/}b\n", "line 2: `${A:+evil/}`"),
        ] {
            let error = judge(text, &Declared::default(), crate::cis::sample::NOW).unwrap_err();
            assert!(error.contains(expected), "{text:?}: {error}");
        }
        let growing: String = (0..64).map(|n| format!("ARG A{}=${{A{n}}}${{A{n}}}x\n", n + 1)).collect();
        let error = judge(&growing, &Declared::default(), crate::cis::sample::NOW).unwrap_err();
        assert!(error.contains("longer than 4096"), "{error}");
        let nested = format!("FROM a\n{}USER 7\n", "ONBUILD ".repeat(100_000));
        assert!(judge(&nested, &Declared::default(), crate::cis::sample::NOW).unwrap_err().contains("ONBUILD"));
        let endless: String = (0..100).map(|n| format!("FROM s{n} AS s{}\n", n + 1)).collect();
        assert!(judge(&endless, &Declared::default(), crate::cis::sample::NOW).unwrap_err().contains("stages"));
    }

    #[test]
    fn any_text_is_an_answer_or_an_error() {
        for end in 0..GOOD.len() {
            let _ = judge(&GOOD[..end], &Declared::default(), crate::cis::sample::NOW);
        }
    }
}
