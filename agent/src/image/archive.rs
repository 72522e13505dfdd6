//! Reads an image as `docker save` writes it: a tar with the configuration, a list of layers, and a tar for each layer. It is
//! read once from front to back, and of it nothing is kept but a few small files and names; what is in it comes from
//! anywhere, so every length has a limit and no name is ever a path on this machine.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::hash::{BuildHasher, RandomState};
use std::io::{self, Read};

use serde::Deserialize;

use crate::facts::engine::{Image, ImageConfig, ImageFiles, ImageInspect, Layer};
use crate::facts::image::{MAX_FILE, MAX_KEPT, Text, of_texts};
use crate::facts::{Hidden, Seen};

/// A tar is made of these.
const BLOCK: usize = 512;
/// Largest configuration or list of layers.
const MAX_JSON: u64 = 8 << 20;
/// Largest name of a file that a header in front of it gives.
const MAX_NAME: u64 = 64 << 10;
/// Layers; an engine makes at most 127.
const MAX_LAYERS: usize = 1_000;

/// What may still be taken in of an archive.
struct Budget {
    /// Entries of all layers together.
    entries: usize,
    /// Bytes of JSON and of the files that are looked at.
    bytes: u64,
    /// By what names are told apart that are not kept.
    names: RandomState,
}

impl Budget {
    fn whole() -> Budget {
        Budget { entries: 2_000_000, bytes: 256 << 20, names: RandomState::new() }
    }

    fn one_entry(&mut self) -> Result<(), ArchiveError> {
        self.entries = self.entries.checked_sub(1).ok_or_else(|| no_image("it has too many files"))?;
        Ok(())
    }

    fn bytes(&mut self, count: u64) -> Result<(), ArchiveError> {
        self.bytes = self.bytes.checked_sub(count).ok_or_else(|| no_image("too much in it would have to be read"))?;
        Ok(())
    }
}

/// Files whose text is looked at, without the leading slash.
const TEXTS: [&str; 5] =
    ["etc/os-release", "usr/lib/os-release", "var/lib/dpkg/status", "lib/apk/db/installed", "etc/passwd"];
/// Directories that say that packages are listed in a way that is not read here.
const RPM: [&str; 3] = ["var/lib/rpm", "usr/lib/sysimage/rpm", "usr/share/rpm"];

/// Why an archive is no image.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// It cannot be read.
    #[error("reading the archive: {0}")]
    Io(#[from] io::Error),
    /// It is none.
    #[error("this is no image as `docker save` writes it: {0}")]
    NoImage(String),
}

fn no_image(why: impl std::fmt::Display) -> ArchiveError {
    ArchiveError::NoImage(crate::watch::plain(&why.to_string()))
}

/// One entry of a tar.
#[derive(Clone, Debug, PartialEq)]
struct Entry {
    /// Without leading `./` and `/`.
    name: String,
    mode: u32,
    kind: u8,
    size: u64,
    /// Where a link leads.
    link: String,
}

impl Entry {
    fn is_file(&self) -> bool {
        matches!(self.kind, b'0' | 0 | b'7')
    }
}

/// A tar that is read from front to back.
struct Tar<R> {
    inner: R,
    /// Bytes of the present entry that were not read, with its padding.
    left: u64,
    padding: u64,
}

impl<R: Read> Tar<R> {
    fn new(inner: R) -> Tar<R> {
        Tar { inner, left: 0, padding: 0 }
    }

    /// The next entry; names that stand in entries of their own are taken in.
    fn next(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let (mut long_name, mut long_link) = (None, None);
        loop {
            self.skip()?;
            let Some(mut entry) = self.header()? else { return Ok(None) };
            match entry.kind {
                b'L' => long_name = Some(self.name(&entry)?),
                b'K' => long_link = Some(self.name(&entry)?),
                b'x' => {
                    let records = self.held(&entry, MAX_NAME)?;
                    long_name = pax(&records, "path").or(long_name);
                    long_link = pax(&records, "linkpath").or(long_link);
                }
                b'g' => {}
                _ => {
                    let name = long_name.unwrap_or(entry.name);
                    entry.name = name.trim_start_matches("./").trim_start_matches('/').trim_end_matches('/').to_owned();
                    entry.link = long_link.unwrap_or(entry.link);
                    return Ok(Some(entry));
                }
            }
        }
    }

    fn name(&mut self, entry: &Entry) -> Result<String, ArchiveError> {
        let bytes = self.held(entry, MAX_NAME)?;
        let end = bytes.iter().position(|byte| *byte == 0).unwrap_or(bytes.len());
        Ok(String::from_utf8_lossy(&bytes[..end]).into_owned())
    }

    fn header(&mut self) -> Result<Option<Entry>, ArchiveError> {
        let mut block = [0; BLOCK];
        if !fill(&mut self.inner, &mut block)? || block.iter().all(|byte| *byte == 0) {
            return Ok(None);
        }
        let sum: u64 =
            block.iter().enumerate().map(|(i, b)| if (148..156).contains(&i) { 32 } else { u64::from(*b) }).sum();
        if number(&block[148..156]) != Some(sum) {
            return Err(no_image("the sum of a header is wrong"));
        }
        let size = number(&block[124..136]).ok_or_else(|| no_image("the size of an entry is none"))?;
        let mode = number(&block[100..108]).unwrap_or_default();
        let name = match &block[257..262] {
            b"ustar" if block[345] != 0 => format!("{}/{}", text(&block[345..500]), text(&block[..100])),
            _ => text(&block[..100]),
        };
        let kind = block[156];
        // A link or a directory has no content, whatever its header says.
        let size = if matches!(kind, b'1'..=b'6') { 0 } else { size };
        self.left = size;
        self.padding = (BLOCK as u64 - size % BLOCK as u64) % BLOCK as u64;
        Ok(Some(Entry { name, mode: mode as u32, kind, size, link: text(&block[157..257]) }))
    }

    /// Passes over what is left of the present entry.
    fn skip(&mut self) -> Result<(), ArchiveError> {
        let rest = self.left.checked_add(self.padding).ok_or_else(|| no_image("an entry is too large"))?;
        let passed = io::copy(&mut (&mut self.inner).take(rest), &mut io::sink())?;
        if passed < rest {
            return Err(no_image("it ends in the middle of an entry"));
        }
        (self.left, self.padding) = (0, 0);
        Ok(())
    }

    /// The content of the present entry, which is at most `most` bytes long.
    fn held(&mut self, entry: &Entry, most: u64) -> Result<Vec<u8>, ArchiveError> {
        if entry.size > most {
            return Err(no_image(format!("`{}` has {} bytes, the limit is {most}", entry.name, entry.size)));
        }
        let mut bytes = Vec::new();
        self.read_to_end(&mut bytes)?;
        match self.left {
            0 => Ok(bytes),
            _ => Err(no_image("it ends in the middle of an entry")),
        }
    }
}

/// The content of the present entry.
impl<R: Read> Read for Tar<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let most = usize::try_from(self.left).unwrap_or(usize::MAX).min(buffer.len());
        let read = self.inner.read(&mut buffer[..most])?;
        self.left -= read as u64;
        Ok(read)
    }
}

/// Fills the buffer; false at the very end, an error in the middle.
fn fill(inner: &mut impl Read, buffer: &mut [u8]) -> Result<bool, ArchiveError> {
    let mut filled = 0;
    while filled < buffer.len() {
        match inner.read(&mut buffer[filled..]) {
            Ok(0) if filled == 0 => return Ok(false),
            Ok(0) => return Err(no_image("it ends in the middle of a header")),
            Ok(read) => filled += read,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(true)
}

/// Octal digits, or bytes where the first bit is set.
fn number(field: &[u8]) -> Option<u64> {
    if field[0] & 0x80 != 0 {
        let (first, rest) = field.split_first()?;
        let wide = rest
            .iter()
            .try_fold(u64::from(first & 0x7f), |sum, byte| sum.checked_mul(256)?.checked_add(u64::from(*byte)));
        return wide.filter(|wide| *wide < 1 << 60);
    }
    let digits: String = field.iter().take_while(|b| **b != 0).map(|b| char::from(*b)).collect();
    let digits = digits.trim();
    if digits.is_empty() { Some(0) } else { u64::from_str_radix(digits, 8).ok() }
}

fn text(field: &[u8]) -> String {
    let end = field.iter().position(|byte| *byte == 0).unwrap_or(field.len());
    String::from_utf8_lossy(&field[..end]).into_owned()
}

/// The value of a record `<length> <key>=<value>\n`.
fn pax(records: &[u8], key: &str) -> Option<String> {
    let text = String::from_utf8_lossy(records);
    let wanted = |line: &str| line.split_once(' ')?.1.strip_prefix(key)?.strip_prefix('=').map(str::to_owned);
    text.lines().filter_map(wanted).next_back()
}

/// What one layer does to the files that are looked at.
#[derive(Debug, Default)]
struct Changes {
    texts: BTreeMap<&'static str, Text>,
    setuid: BTreeSet<String>,
    /// Files that are there without the bit, by a hash of their names: an earlier one of that name is gone.
    plain: HashSet<u64>,
    /// Names that are taken away, with all that is below.
    gone: BTreeSet<String>,
    /// Directories whose earlier content is taken away.
    emptied: BTreeSet<String>,
    rpm: bool,
    /// More was there than is kept.
    is_cut: bool,
}

fn layer(tar: &mut Tar<impl Read>, budget: &mut Budget) -> Result<Changes, ArchiveError> {
    let mut changes = Changes::default();
    while let Some(entry) = tar.next()? {
        budget.one_entry()?;
        budget.bytes((entry.name.len() + entry.link.len()) as u64)?;
        let (dir, base) = entry.name.rsplit_once('/').unwrap_or(("", &entry.name));
        if base == ".wh..wh..opq" {
            keep(&mut changes.emptied, dir.to_owned(), &mut changes.is_cut);
        } else if let Some(hidden) = base.strip_prefix(".wh.") {
            let hidden = if dir.is_empty() { hidden.to_owned() } else { format!("{dir}/{hidden}") };
            keep(&mut changes.gone, hidden, &mut changes.is_cut);
        } else if entry.is_file() {
            file(tar, &entry, &mut changes, budget)?;
        } else {
            changes.rpm |= RPM.contains(&entry.name.as_str());
            // A hard link has the bits of what it leads to.
            let target = entry.link.trim_start_matches("./").trim_start_matches('/');
            if entry.kind == b'1' && changes.setuid.contains(target) {
                keep(&mut changes.setuid, entry.name, &mut changes.is_cut);
            }
        }
    }
    Ok(changes)
}

fn file(
    tar: &mut Tar<impl Read>,
    entry: &Entry,
    changes: &mut Changes,
    budget: &mut Budget,
) -> Result<(), ArchiveError> {
    if let Some(known) = TEXTS.iter().find(|name| **name == entry.name) {
        let text = match entry.size <= MAX_FILE {
            true => {
                budget.bytes(entry.size)?;
                Text::Whole(String::from_utf8_lossy(&tar.held(entry, MAX_FILE)?).into_owned())
            }
            false => Text::Unread,
        };
        changes.texts.insert(known, text);
    }
    changes.rpm |= RPM.iter().any(|dir| entry.name.strip_prefix(dir).is_some_and(|rest| rest.starts_with('/')));
    if entry.mode & 0o6000 != 0 {
        keep(&mut changes.setuid, entry.name.clone(), &mut changes.is_cut);
    } else {
        changes.plain.insert(budget.names.hash_one(&entry.name));
    }
    Ok(())
}

fn keep(names: &mut BTreeSet<String>, name: String, is_cut: &mut bool) {
    match names.len() < MAX_KEPT {
        true => drop(names.insert(name)),
        false => *is_cut = true,
    }
}

/// The layers one upon the other. What a layer takes away is looked for in what is there, not the other way round: the work
/// grows with what was read, whatever is in it.
fn stacked(layers: Vec<Changes>, names: &RandomState) -> ImageFiles {
    let (mut texts, mut setuid, mut rpm, mut is_cut) = (BTreeMap::new(), BTreeMap::new(), false, false);
    for layer in layers {
        texts.retain(|name: &&str, _| !layer.takes_away(name));
        for gone in &layer.gone {
            setuid.remove(gone);
        }
        for dir in layer.gone.iter().chain(&layer.emptied) {
            empty(&mut setuid, dir);
        }
        setuid.retain(|_, hash| !layer.plain.contains(hash));
        texts.extend(layer.texts);
        setuid.extend(layer.setuid.into_iter().map(|name| (name.clone(), names.hash_one(&name))));
        rpm |= layer.rpm;
        is_cut |= layer.is_cut || setuid.len() > MAX_KEPT;
        if is_cut {
            setuid.clear();
        }
    }
    let found = setuid.into_keys().map(|name| format!("/{name}")).collect();
    let text = |name: &str| texts.remove(name).unwrap_or_default();
    let [release, other, dpkg, apk, passwd] = TEXTS.map(text);
    let files = of_texts(if release == Text::Missing { &other } else { &release }, &dpkg, &apk, &passwd);
    ImageFiles { setuid: (!is_cut).then_some(found), unread_packages: rpm || files.unread_packages, ..files }
}

/// Takes out what is below `dir`.
fn empty(names: &mut BTreeMap<String, u64>, dir: &str) {
    let begin = if dir.is_empty() { String::new() } else { format!("{dir}/") };
    let below = names.range(begin.clone()..).map(|(name, _)| name).take_while(|name| name.starts_with(&begin));
    let below: Vec<String> = below.cloned().collect();
    for name in below {
        names.remove(&name);
    }
}

impl Changes {
    /// Whether what an earlier layer has under this name is gone.
    fn takes_away(&self, name: &str) -> bool {
        let mut dirs = name.match_indices('/').map(|(end, _)| &name[..end]).chain([""]);
        self.gone.contains(name) || dirs.any(|dir| self.gone.contains(dir) || self.emptied.contains(dir))
    }
}

/// One of `manifest.json`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Manifest {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// The configuration.
#[derive(Deserialize)]
struct Stored {
    #[serde(default)]
    created: Option<String>,
    config: ImageConfig,
    #[serde(default)]
    history: Option<Vec<StoredLayer>>,
}

#[derive(Deserialize)]
struct StoredLayer {
    #[serde(default)]
    created_by: Option<String>,
}

/// Reads the image in an archive, of which there must be one.
pub fn read(archive: impl Read) -> Result<Image, ArchiveError> {
    let mut tar = Tar::new(archive);
    let (mut budget, mut small) = (Budget::whole(), BTreeMap::new());
    let mut layers: BTreeMap<String, Result<Changes, String>> = BTreeMap::new();
    let mut links: BTreeMap<String, String> = BTreeMap::new();
    while let Some(entry) = tar.next()? {
        budget.one_entry()?;
        budget.bytes(entry.name.len() as u64)?;
        if layers.len() > MAX_LAYERS {
            return Err(no_image(format!("it has more than {MAX_LAYERS} layers")));
        }
        if entry.kind == b'2' && links.len() < MAX_KEPT {
            // The old form has a layer that two images share once, and links to it.
            links.insert(entry.name.clone(), entry.link.trim_start_matches("../").to_owned());
        }
        if !entry.is_file() || entry.size == 0 {
            continue;
        }
        let mut first = [0; BLOCK];
        let read = usize::try_from(entry.size).unwrap_or(BLOCK).min(BLOCK);
        if !fill(&mut tar, &mut first[..read])? {
            return Err(no_image("it ends in the middle of an entry"));
        }
        let whole = (&first[..read]).chain(&mut tar);
        match form(&first[..read]) {
            Form::Json if entry.size <= MAX_JSON => {
                budget.bytes(entry.size)?;
                let mut bytes = Vec::new();
                whole.take(MAX_JSON).read_to_end(&mut bytes)?;
                small.insert(entry.name, bytes);
            }
            Form::Tar => {
                let changes = layer(&mut Tar::new(whole), &mut budget)?;
                layers.insert(entry.name, Ok(changes));
            }
            Form::Compressed(how) => {
                drop(layers.insert(entry.name, Err(format!("its layers are compressed with {how}"))))
            }
            _ => {}
        }
    }
    image(&small, layers, &links, &budget.names)
}

enum Form {
    Json,
    Tar,
    Compressed(&'static str),
    Other,
}

fn form(first: &[u8]) -> Form {
    match first {
        [b'{' | b'[', ..] => Form::Json,
        [0x1f, 0x8b, ..] => Form::Compressed("gzip"),
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Form::Compressed("zstd"),
        // An empty layer is nothing but zeros.
        block if block.len() == BLOCK && (&block[257..262] == b"ustar" || block.iter().all(|byte| *byte == 0)) => {
            Form::Tar
        }
        _ => Form::Other,
    }
}

fn image(
    small: &BTreeMap<String, Vec<u8>>,
    mut layers: BTreeMap<String, Result<Changes, String>>,
    links: &BTreeMap<String, String>,
    hasher: &RandomState,
) -> Result<Image, ArchiveError> {
    let manifest = small.get("manifest.json").ok_or_else(|| no_image("there is no manifest.json"))?;
    let mut manifests: Vec<Manifest> = serde_json::from_slice(manifest).map_err(no_image)?;
    let count = manifests.len();
    let (Some(manifest), 1) = (manifests.pop(), count) else {
        return Err(no_image(format!("it holds {count} images: save one")));
    };
    let stored = small.get(&manifest.config).ok_or_else(|| no_image("its configuration is missing"))?;
    let id = format!("sha256:{}", sidewarden_proto::identity::Sha256::of(&[stored]));
    let stored: Stored = serde_json::from_slice(stored).map_err(no_image)?;
    let files = files(&manifest.layers, &mut layers, links, hasher)?;
    let history = stored.history.unwrap_or_default();
    let line = |layer: StoredLayer| Layer { created_by: layer.created_by.unwrap_or_default(), size: 0 };
    let inspect = ImageInspect {
        id,
        repo_digests: Vec::new(),
        repo_tags: manifest.repo_tags.unwrap_or_default(),
        created: stored.created.unwrap_or_default(),
        config: stored.config,
    };
    Ok(Image { inspect, history: history.into_iter().rev().map(line).collect(), files })
}

fn files(
    names: &[String],
    layers: &mut BTreeMap<String, Result<Changes, String>>,
    links: &BTreeMap<String, String>,
    hasher: &RandomState,
) -> Result<Seen<ImageFiles>, ArchiveError> {
    let mut stack = Vec::new();
    for name in names {
        let name = links.get(name).unwrap_or(name);
        match layers.remove(name) {
            Some(Ok(changes)) => stack.push(changes),
            Some(Err(why)) => return Ok(Seen::Hidden(Hidden::unclear("layers of the image", why))),
            // The same layer may stand in the list twice; the second time it changes nothing.
            None if names.iter().filter(|other| *other == name).count() > 1 => {}
            None => return Err(no_image(format!("its layer {name} is missing"))),
        }
    }
    Ok(Seen::Known(stacked(stack, hasher), "layers of the image".into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A tar, built by hand: nothing of what is tested makes it.
    #[derive(Default)]
    struct Builder(Vec<u8>);

    impl Builder {
        fn entry(mut self, name: &str, kind: u8, mode: u32, content: &[u8], link: &str) -> Builder {
            let mut block = [0; BLOCK];
            block[..name.len()].copy_from_slice(name.as_bytes());
            block[100..107].copy_from_slice(format!("{mode:07o}").as_bytes());
            block[124..135].copy_from_slice(format!("{:011o}", content.len()).as_bytes());
            block[156] = kind;
            block[157..157 + link.len()].copy_from_slice(link.as_bytes());
            block[257..263].copy_from_slice(b"ustar\0");
            block[148..156].fill(b' ');
            let sum: u64 = block.iter().map(|byte| u64::from(*byte)).sum();
            block[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
            self.0.extend(block);
            self.0.extend(content);
            self.0.resize(self.0.len().next_multiple_of(BLOCK), 0);
            self
        }

        fn file(self, name: &str, mode: u32, content: &[u8]) -> Builder {
            self.entry(name, b'0', mode, content, "")
        }

        fn done(mut self) -> Vec<u8> {
            self.0.extend([0; 2 * BLOCK]);
            self.0
        }
    }

    const CONFIG: &str = r#"{"created":"2026-11-01T00:00:00Z","config":{"User":"app","Env":["PATH=/bin"]},
        "history":[{"created_by":"ADD rootfs.tar /"},{"created_by":"RUN x","empty_layer":true}]}"#;

    fn base() -> Vec<u8> {
        let long = "d/".repeat(60) + "su";
        Builder::default()
            .file("./etc/os-release", 0o644, b"ID=debian\nVERSION_ID=12\n")
            .file("etc/passwd", 0o644, b"root:x:0:0::/:\napp:x:7:7::/:\n")
            .file("var/lib/dpkg/status", 0o644, b"Package: bash\n\nPackage: gcc\n")
            .file("bin/su", 0o4755, b"x")
            .file("bin/mount", 0o4755, b"x")
            .file("bin/chmodded", 0o4755, b"x")
            .file("opt/old/tool", 0o2755, b"x")
            .entry("bin/su2", b'1', 0o4755, b"", "bin/su")
            .entry("./@LongLink", b'L', 0, format!("{long}\0").as_bytes(), "")
            .file("cut", 0o4755, b"x")
            .done()
    }

    fn above() -> Vec<u8> {
        Builder::default()
            .file("bin/.wh.mount", 0o644, b"")
            .file("bin/chmodded", 0o755, b"x")
            .file("opt/.wh..wh..opq", 0o644, b"")
            .file("var/lib/dpkg/status", 0o644, b"Package: bash\n")
            .done()
    }

    fn saved(layers: &[(&str, Vec<u8>)]) -> Vec<u8> {
        let names: Vec<String> = layers.iter().map(|(name, _)| format!("\"{name}\"")).collect();
        let manifest = format!(r#"[{{"Config":"c.json","RepoTags":["x:1"],"Layers":[{}]}}]"#, names.join(","));
        // As engines write it: the list comes last.
        let all = layers.iter().fold(Builder::default(), |all, (name, layer)| all.file(name, 0o644, layer));
        all.file("c.json", 0o644, CONFIG.as_bytes()).file("manifest.json", 0o644, manifest.as_bytes()).done()
    }

    fn whole() -> Vec<u8> {
        saved(&[("a/layer.tar", base()), ("b/layer.tar", above())])
    }

    #[test]
    fn an_image_is_read_with_its_layers_one_upon_the_other() {
        let image = read(&whole()[..]).unwrap();
        assert_eq!((image.inspect.config.user.as_str(), image.inspect.repo_tags), ("app", vec!["x:1".to_owned()]));
        let id = sidewarden_proto::identity::Sha256::of(&[CONFIG.as_bytes()]);
        assert_eq!(image.inspect.id, format!("sha256:{id}"));
        assert_eq!(image.history[0].created_by, "RUN x", "newest first");
        let Seen::Known(files, _) = image.files else { panic!("{:?}", image.files) };
        assert_eq!(files.release, Some(("debian".into(), "12".into())));
        assert_eq!((files.roots, files.packages), (vec!["root".to_owned()], Some(vec!["bash".to_owned()])));
        let long = format!("/{}su", "d/".repeat(60));
        assert_eq!(files.setuid, Some(vec!["/bin/su".to_owned(), "/bin/su2".into(), long]));
    }

    fn of(layers: Vec<Changes>) -> ImageFiles {
        stacked(layers, &RandomState::new())
    }

    fn with_bit(names: impl IntoIterator<Item = String>) -> Changes {
        Changes { setuid: names.into_iter().collect(), ..Changes::default() }
    }

    #[test]
    fn what_a_layer_takes_away_is_gone_with_all_that_is_below() {
        let names = ["a", "a/b", "a/b/c", "a-b", "ab/c", "etc/passwd"].map(str::to_owned);
        let left = |gone: &[&str], emptied: &[&str]| {
            let set = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect();
            let above = Changes { gone: set(gone), emptied: set(emptied), ..Changes::default() };
            let mut below = with_bit(names.clone());
            below.texts.insert("etc/passwd", Text::Whole("root:x:0".into()));
            let files = of(vec![below, above]);
            (files.setuid.unwrap().join(" "), files.roots.len())
        };
        assert_eq!(left(&["a"], &[]), ("/a-b /ab/c /etc/passwd".into(), 1));
        assert_eq!(left(&["a/b"], &[]), ("/a /a-b /ab/c /etc/passwd".into(), 1));
        assert_eq!(left(&[], &["a"]), ("/a /a-b /ab/c /etc/passwd".into(), 1));
        assert_eq!(left(&["etc"], &["a/b"]), ("/a /a-b /a/b /ab/c".into(), 0));
        assert_eq!(left(&["a/", "x"], &["etc"]), ("/a /a-b /a/b /a/b/c /ab/c".into(), 0));
        assert_eq!(left(&[], &[""]), (String::new(), 0));
    }

    #[test]
    fn many_layers_that_take_much_away_are_read_in_time_that_grows_with_them() {
        // Held against each other, these would be compared two thousand million times.
        let below = with_bit((0..MAX_KEPT).map(|n| format!("bin/{n}")));
        let above = || Changes { gone: (0..MAX_KEPT).map(|n| format!("x/{n}")).collect(), ..Changes::default() };
        let layers = std::iter::once(below).chain(std::iter::repeat_with(above).take(20));
        assert_eq!(of(layers.collect()).setuid.unwrap().len(), MAX_KEPT);
    }

    #[test]
    fn too_many_files_with_the_bit_are_not_known() {
        let half = |begin: usize| with_bit((begin..begin + MAX_KEPT).map(|n| n.to_string()));
        assert_eq!(of(vec![half(0)]).setuid.unwrap().len(), MAX_KEPT);
        assert_eq!(of(vec![half(0), half(1)]).setuid, None);
    }

    #[test]
    fn a_list_of_packages_that_is_too_long_is_unread_until_another_layer_replaces_it() {
        let listed = |text: Text| Changes { texts: [(TEXTS[2], text)].into(), ..Changes::default() };
        let long = of(vec![listed(Text::Unread)]);
        assert_eq!((long.packages, long.unread_packages), (None, true));
        let replaced = of(vec![listed(Text::Unread), listed(Text::Whole("Package: bash\n".into()))]);
        assert_eq!((replaced.packages, replaced.unread_packages), (Some(vec!["bash".to_owned()]), false));
    }

    #[test]
    fn names_are_paid_for() {
        let long = "n".repeat(99);
        let layer_of = |bytes: u64| {
            let tar = (0..10).fold(Builder::default(), |tar, _| tar.file(&long, 0o644, b"")).done();
            let mut budget = Budget { bytes, ..Budget::whole() };
            layer(&mut Tar::new(&tar[..]), &mut budget)
        };
        assert!(layer_of(990).is_ok());
        assert!(layer_of(989).unwrap_err().to_string().contains("too much"));
    }

    #[test]
    fn an_archive_cut_at_any_place_is_refused() {
        let whole = whole();
        // What follows the list of layers is only the end.
        let end = whole.len() - 2 * BLOCK;
        for cut in (0..end).step_by(37).chain([end - 1]) {
            assert!(read(&whole[..cut]).is_err(), "cut at {cut}");
        }
        assert!(read(&whole[..end]).is_ok());
    }

    #[test]
    fn a_flipped_byte_never_panics() {
        let whole = whole();
        for at in (0..whole.len()).step_by(11) {
            let mut changed = whole.clone();
            changed[at] ^= 0xff;
            let _ = read(&changed[..]);
        }
    }

    #[test]
    fn compressed_layers_say_so_and_a_missing_one_is_no_image() {
        let gzip = [&[0x1f, 0x8b][..], &[0; 600]].concat();
        let image = read(&saved(&[("a", gzip)])[..]).unwrap();
        let Seen::Hidden(why) = image.files else { panic!("{:?}", image.files) };
        assert!(why.why.to_string().contains("gzip"), "{why:?}");
        let manifest = br#"[{"Config":"c.json","Layers":["gone"]}]"#;
        let lacking = Builder::default().file("c.json", 0, CONFIG.as_bytes()).file("manifest.json", 0, manifest).done();
        assert!(read(&lacking[..]).unwrap_err().to_string().contains("is missing"));
    }

    #[test]
    fn what_is_no_image_says_what_it_lacks() {
        for (archive, expected) in [
            (vec![], "manifest.json"),
            (b"#!/bin/sh\n".repeat(100), "sum of a header"),
            (Builder::default().file("manifest.json", 0, b"[]").done(), "holds 0 images"),
            (Builder::default().file("manifest.json", 0, b"[7]").done(), "no image"),
        ] {
            let error = read(&archive[..]).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_header_that_promises_too_much_is_not_believed() {
        let mut huge = Builder::default().file("etc/passwd", 0o644, b"").0;
        huge[124..136].copy_from_slice(&[0xff; 12]);
        huge[148..156].fill(b' ');
        let sum: u64 = huge[..BLOCK].iter().map(|byte| u64::from(*byte)).sum();
        huge[148..155].copy_from_slice(format!("{sum:06o}\0").as_bytes());
        assert!(read(&huge[..]).is_err());
        let long_name = Builder::default().entry("x", b'L', 0, &vec![b'a'; 70 << 10], "").done();
        assert!(read(&long_name[..]).unwrap_err().to_string().contains("the limit is"));
    }
}
