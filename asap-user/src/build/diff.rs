//! Reads unified diffs and applies them to texts. In C and C++ it keeps the line numbers of the code that stays: behind each
//! change of length it writes `#line`, so that `__LINE__` there (in macros for logs and assertions) gives the same as before and
//! marks no function as changed. Pure: bytes in, bytes out.

/// A diff of several files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Diff {
    /// In the order of the diff.
    pub files: Vec<FileDiff>,
}

/// What changes in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct FileDiff {
    /// Its name before; none: it is new.
    pub old: Option<String>,
    /// Its name after; none: it is removed.
    pub new: Option<String>,
    hunks: Vec<Hunk>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Hunk {
    /// First line, counted from 1.
    start: usize,
    lines: Vec<(Edit, Vec<u8>)>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Edit {
    Keep,
    Remove,
    Add,
}

/// A diff can't be used.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DiffError {
    /// Not a unified diff.
    #[error("it holds no unified diff (made by `diff -u` or `git diff`)")]
    Empty,
    /// Damaged.
    #[error("line {line}: {problem}; get the diff again, unchanged by mail programs")]
    Damaged {
        /// Line of the diff.
        line: usize,
        /// What is wrong.
        problem: &'static str,
    },
    /// It leads out of the source.
    #[error("it names {0}, which is not within the source")]
    Outside(String),
    /// A diff of a diff.
    #[error("it changes {0}, which is a patch itself; give that patch as it is afterwards, on a source without it")]
    ChangedPatch(String),
    /// Parts that no text has.
    #[error("it changes {0}, which is not text; leave that file out of the diff")]
    Binary(String),
    /// The source is another one.
    #[error(
        "hunk {hunk} (line {line}) does not fit {file}; it is for another version of the source, or it is in already"
    )]
    DoesNotFit {
        /// The file.
        file: String,
        /// Number of the hunk, from 1.
        hunk: usize,
        /// Where it should be.
        line: usize,
    },
}

impl Diff {
    /// Reads a diff; what stands around it (mail headers, `git` lines) is passed over.
    ///
    /// # Errors
    /// There is none, or it is damaged.
    pub fn parse(bytes: &[u8]) -> Result<Self, DiffError> {
        let lines: Vec<&[u8]> = bytes.split_inclusive(|&byte| byte == b'\n').collect();
        let mut files: Vec<FileDiff> = Vec::new();
        let mut at = 0;
        while at < lines.len() {
            if let Some(binary) =
                lines[at].strip_prefix(b"Binary files ").or_else(|| lines[at].strip_prefix(b"GIT binary"))
            {
                return Err(DiffError::Binary(String::from_utf8_lossy(binary).trim().to_owned()));
            }
            let next = lines.get(at + 1).copied().unwrap_or_default();
            if lines[at].starts_with(b"--- ") && next.starts_with(b"+++ ") {
                files.push(FileDiff { old: name(lines[at])?, new: name(next)?, hunks: Vec::new() });
                at += 2;
            } else if lines[at].starts_with(b"@@ ") && !files.is_empty() {
                let (hunk, end) = read_hunk(&lines, at)?;
                if let Some(file) = files.last_mut() {
                    file.hunks.push(hunk);
                }
                at = end;
            } else {
                at += 1;
            }
        }
        files.retain(|file| !file.hunks.is_empty());
        if files.is_empty() { Err(DiffError::Empty) } else { Ok(Self { files }) }
    }
}

/// The file name of a `---` or `+++` line, without what follows a tab.
fn name(line: &[u8]) -> Result<Option<String>, DiffError> {
    let name = line[4..].split(|&byte| matches!(byte, b'\t' | b'\n' | b'\r')).next().unwrap_or_default();
    let name = String::from_utf8_lossy(name).trim_matches('"').trim_end().to_owned();
    if name == "/dev/null" {
        return Ok(None);
    }
    if name.is_empty() || name.split('/').any(|part| part == "..") {
        return Err(DiffError::Outside(name));
    }
    Ok(Some(name))
}

fn read_hunk(lines: &[&[u8]], at: usize) -> Result<(Hunk, usize), DiffError> {
    let damaged = |at: usize, problem| DiffError::Damaged { line: at + 1, problem };
    let header = String::from_utf8_lossy(lines[at]);
    let mut fields = header.split_whitespace().skip(1);
    let mut range = |sign| -> Option<(usize, usize)> {
        let text = fields.next()?.strip_prefix(sign)?;
        let (start, count) = text.split_once(',').unwrap_or((text, "1"));
        Some((start.parse().ok()?, count.parse().ok()?))
    };
    let (Some((start, mut old)), Some((_, mut new))) = (range('-'), range('+')) else {
        return Err(damaged(at, "the head of a hunk is no such"));
    };
    // A hunk that only adds counts the line before it.
    let start = if old == 0 { start + 1 } else { start };
    let mut hunk = Hunk { start, lines: Vec::new() };
    let mut at = at + 1;
    while old > 0 || new > 0 {
        let line = *lines.get(at).ok_or_else(|| damaged(at, "the diff ends within a hunk"))?;
        let (edit, text) = match line.first() {
            Some(b' ') => (Edit::Keep, &line[1..]),
            Some(b'-') => (Edit::Remove, &line[1..]),
            Some(b'+') => (Edit::Add, &line[1..]),
            // Mail programs cut the blank off empty lines.
            Some(b'\n' | b'\r') => (Edit::Keep, line),
            Some(b'\\') => {
                at += 1;
                continue;
            }
            _ => return Err(damaged(at, "a hunk is shorter than its head says")),
        };
        let counts = [(edit != Edit::Add, &mut old), (edit != Edit::Remove, &mut new)];
        for (counted, left) in counts {
            if counted {
                *left = left.checked_sub(1).ok_or_else(|| damaged(at, "a hunk is longer than its head says"))?;
            }
        }
        hunk.lines.push((edit, text.to_vec()));
        at += 1;
    }
    Ok((hunk, at))
}

impl Diff {
    /// The patches that a diff of a Debian package brings: names, and what they are after it.
    ///
    /// # Errors
    /// Such a patch is changed, so that the diff alone does not tell what it is.
    pub fn inner(&self) -> Result<Vec<(String, Vec<u8>)>, DiffError> {
        let is_patch = |file: &&FileDiff| {
            let name = file.new.as_deref().and_then(|name| name.split_once("debian/patches/")).map(|(_, name)| name);
            name.is_some_and(|name| name != "series" && !name.starts_with('.'))
        };
        let text = |file: &FileDiff| {
            let name = file.new.clone().unwrap_or_default();
            match &file.old {
                Some(_) => Err(DiffError::ChangedPatch(name)),
                None => Ok((name.clone(), file.apply("patch", b"")?)),
            }
        };
        self.files.iter().filter(is_patch).map(text).collect()
    }

    /// Leaves out what concerns a Debian package's own files (`debian/`): they are no code.
    pub fn leave_out_packaging(&mut self) {
        let is_packaging =
            |file: &FileDiff| (0..2).any(|strip| file.path(strip).is_some_and(|path| path.starts_with("debian/")));
        self.files.retain(|file| !is_packaging(file));
    }

    /// Whether it adds each line that `other` adds.
    #[must_use]
    pub fn adds_all_of(&self, other: &Self) -> bool {
        let added = |diff: &Self| -> Vec<Vec<u8>> {
            let lines = diff.files.iter().flat_map(|file| &file.hunks).flat_map(|hunk| &hunk.lines);
            lines.filter(|(edit, _)| *edit == Edit::Add).map(|(_, text)| trimmed(text).to_owned()).collect()
        };
        let (own, wanted) = (added(self), added(other));
        !wanted.is_empty() && wanted.iter().all(|line| own.contains(line))
    }
}

impl FileDiff {
    /// The diff that takes this one back.
    #[must_use]
    pub fn reversed(&self) -> Self {
        let mut reversed = self.clone();
        std::mem::swap(&mut reversed.old, &mut reversed.new);
        for hunk in &mut reversed.hunks {
            for (edit, _) in &mut hunk.lines {
                *edit = match edit {
                    Edit::Keep => Edit::Keep,
                    Edit::Remove => Edit::Add,
                    Edit::Add => Edit::Remove,
                };
            }
        }
        reversed
    }

    /// The file that it is about: its name after, or before if it goes; `strip` leading folders are left out.
    #[must_use]
    pub fn path(&self, strip: usize) -> Option<String> {
        let name = self.new.as_ref().or(self.old.as_ref())?;
        let parts: Vec<&str> = name.split('/').skip(strip).collect();
        let path = parts.join("/");
        (!path.is_empty() && !path.starts_with('/')).then_some(path)
    }

    /// The text of `file` with the changes; with `#line` where that keeps the numbers of what stays.
    ///
    /// # Errors
    /// The text is another than the diff was made for.
    pub fn apply(&self, file: &str, text: &[u8]) -> Result<Vec<u8>, DiffError> {
        let mut text = if self.old.is_some() { Text::read(text) } else { Text::default() };
        text.change(self, file)?;
        Ok(text.write(file))
    }
}

/// A text that diffs change, one after the other: what stays remembers its line in the text as it was.
#[derive(Clone, Debug, Default)]
pub struct Text {
    lines: Vec<Line>,
}

#[derive(Clone, Debug)]
struct Line {
    bytes: Vec<u8>,
    /// Its number, from 0, before any change; none: it is new.
    number: Option<usize>,
}

impl Text {
    /// A text as it is.
    #[must_use]
    pub fn read(text: &[u8]) -> Self {
        let lines = text.split_inclusive(|&byte| byte == b'\n').enumerate();
        Self { lines: lines.map(|(number, line)| Line { bytes: line.to_vec(), number: Some(number) }).collect() }
    }

    /// Changes it by a file's part of a diff.
    ///
    /// # Errors
    /// The text is another than the diff was made for.
    pub fn change(&mut self, diff: &FileDiff, file: &str) -> Result<(), DiffError> {
        let old: Vec<&[u8]> = self.lines.iter().map(|line| line.bytes.as_slice()).collect();
        let mut lines = Vec::with_capacity(old.len());
        let (mut at, mut shift) = (0, 0_isize);
        for (number, hunk) in diff.hunks.iter().enumerate() {
            let wanted = (hunk.start as isize - 1 + shift).max(0) as usize;
            let place = find(&old, hunk, at, wanted).ok_or_else(|| DiffError::DoesNotFit {
                file: file.to_owned(),
                hunk: number + 1,
                line: hunk.start,
            })?;
            shift = place as isize - (hunk.start as isize - 1);
            lines.extend_from_slice(&self.lines[at..place]);
            at = place;
            for (edit, bytes) in &hunk.lines {
                match edit {
                    Edit::Keep => lines.push(self.lines[at].clone()),
                    Edit::Remove => {}
                    Edit::Add => lines.push(Line { bytes: bytes.clone(), number: None }),
                }
                at += usize::from(*edit != Edit::Add);
            }
        }
        lines.extend_from_slice(&self.lines[at..]);
        self.lines = lines;
        Ok(())
    }

    /// The text of `file` now; with `#line` where that keeps the numbers of what stays.
    #[must_use]
    pub fn write(&self, file: &str) -> Vec<u8> {
        let keeps_numbers = is_c(file);
        let mut output = Output { bytes: Vec::new(), scanner: Scanner::default() };
        // The number that the compiler gives the next line.
        let mut counted = 0;
        for line in &self.lines {
            if let Some(number) = line.number.filter(|number| keeps_numbers && *number != counted)
                && output.scanner.is_between_statements()
            {
                output.put(format!("#line {}\n", number + 1).as_bytes());
                counted = number;
            }
            output.put(&line.bytes);
            counted += 1;
        }
        output.bytes
    }
}

/// Where a hunk fits: as near as can be to where it should be, and behind the ones before it.
fn find(lines: &[&[u8]], hunk: &Hunk, from: usize, wanted: usize) -> Option<usize> {
    let before: Vec<&[u8]> =
        hunk.lines.iter().filter(|(edit, _)| *edit != Edit::Add).map(|(_, text)| trimmed(text)).collect();
    let last = lines.len().checked_sub(before.len())?;
    let wanted = wanted.min(last);
    let fits = |at: &usize| {
        (from..=last).contains(at) && before.iter().zip(&lines[*at..]).all(|(wanted, line)| *wanted == trimmed(line))
    };
    (0..=lines.len()).flat_map(|far| [wanted.checked_sub(far), wanted.checked_add(far)]).flatten().find(fits)
}

/// Line ends don't count: the diff's may have been changed on its way.
fn trimmed(line: &[u8]) -> &[u8] {
    let line = line.strip_suffix(b"\n").unwrap_or(line);
    line.strip_suffix(b"\r").unwrap_or(line)
}

/// Whether a C compiler reads it.
fn is_c(file: &str) -> bool {
    const ENDINGS: [&str; 12] = ["c", "h", "cc", "cpp", "cxx", "c++", "C", "hh", "hpp", "hxx", "inc", "ipp"];
    file.rsplit_once('.').is_some_and(|(_, ending)| ENDINGS.contains(&ending))
}

struct Output {
    bytes: Vec<u8>,
    scanner: Scanner,
}

impl Output {
    fn put(&mut self, line: &[u8]) {
        // The last line of a file may have no end, and something follows now.
        if self.bytes.last().is_some_and(|&last| last != b'\n') {
            self.bytes.push(b'\n');
        }
        self.bytes.extend_from_slice(line);
        self.scanner.line(line);
    }
}

/// Follows a C text, to know where a line with a directive may stand: not in comments, strings, parentheses (they may be a
/// macro's), nor behind a backslash.
#[derive(Clone, Debug, Default)]
struct Scanner {
    in_comment: bool,
    continued: bool,
    /// A string goes on behind the backslash.
    in_string: bool,
    /// The end of a raw string that is open: `)name"`.
    raw: Option<Vec<u8>>,
    depth: usize,
    in_directive: bool,
}

impl Scanner {
    fn is_between_statements(&self) -> bool {
        !self.in_comment && !self.continued && self.raw.is_none() && self.depth == 0
    }

    fn line(&mut self, line: &[u8]) {
        let line = trimmed(line);
        let starts = line.iter().find(|byte| !byte.is_ascii_whitespace()).copied();
        if !self.in_comment && !self.continued {
            self.in_directive = starts == Some(b'#');
            // Conditional code may hold the same parenthesis twice; a function's end sets that right.
            if line.first() == Some(&b'}') {
                self.depth = 0;
            }
        }
        let continues = line.last() == Some(&b'\\');
        let mut at = 0;
        if std::mem::take(&mut self.in_string) {
            let (length, is_closed) = literal(line, b'"', 0);
            self.in_string = !is_closed && continues;
            at = length;
        }
        while at < line.len() {
            let rest = &line[at..];
            if let Some(end) = &self.raw {
                match rest.windows(end.len()).position(|window| window == end) {
                    Some(found) => {
                        at += found + end.len();
                        self.raw = None;
                    }
                    None => break,
                }
            } else if self.in_comment {
                match rest.windows(2).position(|window| window == b"*/") {
                    Some(found) => {
                        at += found + 2;
                        self.in_comment = false;
                    }
                    None => break,
                }
            } else if rest.starts_with(b"/*") {
                self.in_comment = true;
                at += 2;
            } else if rest.starts_with(b"//") {
                break;
            } else if rest.starts_with(b"R\"") {
                let name = rest[2..].split(|&byte| byte == b'(').next().unwrap_or_default();
                self.raw = Some([b")", name, b"\""].concat());
                at += 2 + name.len();
            } else if matches!(rest[0], b'"' | b'\'') {
                let (length, is_closed) = literal(rest, rest[0], 1);
                self.in_string = !is_closed && continues && rest[0] == b'"';
                at += length;
            } else {
                match rest[0] {
                    b'(' if !self.in_directive => self.depth += 1,
                    b')' if !self.in_directive => self.depth = self.depth.saturating_sub(1),
                    _ => {}
                }
                at += 1;
            }
        }
        self.continued = continues;
    }
}

/// Where the string or character that `text` begins with ends, looked for from `at`, and whether it ends at all.
fn literal(text: &[u8], quote: u8, mut at: usize) -> (usize, bool) {
    while at < text.len() {
        match text[at] {
            b'\\' => at += 2,
            byte if byte == quote => return (at + 1, true),
            _ => at += 1,
        }
    }
    (text.len(), false)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOURCE: &str = "int a;\nint f(int x)\n{\n    log(x,\n        1);\n    return x;\n}\nint g;\n";

    fn applied(diff: &str, source: &str) -> Result<String, DiffError> {
        let diff = Diff::parse(diff.as_bytes())?;
        diff.files[0]
            .apply(&diff.files[0].path(0).expect("a name"), source.as_bytes())
            .map(|text| String::from_utf8(text).expect("text"))
    }

    #[test]
    fn lines_that_stay_keep_their_numbers() {
        let diff = "--- a/f.c\n+++ b/f.c\n@@ -2,3 +2,4 @@\n int f(int x)\n {\n+    check(x);\n     log(x,\n";
        let text = applied(diff, SOURCE).expect("it fits");
        assert_eq!(text, SOURCE.replace("    log", "    check(x);\n#line 4\n    log"));
        let inside = "--- a/f.c\n+++ b/f.c\n@@ -4,2 +4,3 @@\n     log(x,\n+        y,\n         1);\n";
        let text = applied(inside, SOURCE).expect("it fits");
        assert_eq!(text, SOURCE.replace("x,\n", "x,\n        y,\n").replace("    return", "#line 6\n    return"));
        let header = diff.replace("f.c", "f.py");
        assert!(!applied(&header, SOURCE).expect("it fits").contains("#line"));
        let same_length = "--- a/f.c\n+++ b/f.c\n@@ -1 +1 @@\n-int a;\n+int b;\n";
        assert_eq!(applied(same_length, SOURCE).expect("it fits"), SOURCE.replace("int a", "int b"));
    }

    #[test]
    fn a_diff_fits_what_the_one_before_it_made() {
        // The second has a line of the first among its context; numbers are those of the text before both.
        let first = "--- a/f.c\n+++ b/f.c\n@@ -2,3 +2,4 @@\n int f(int x)\n {\n+    check(x);\n     log(x,\n";
        let second = "--- a/f.c\n+++ b/f.c\n@@ -4,3 +4,4 @@\n     check(x);\n     log(x,\n+        y,\n         1);\n";
        let mut text = Text::read(SOURCE.as_bytes());
        for diff in [first, second] {
            text.change(&Diff::parse(diff.as_bytes()).expect("a diff").files[0], "f.c").expect("it fits");
        }
        let expected = SOURCE
            .replace("    log(x,\n", "    check(x);\n#line 4\n    log(x,\n        y,\n")
            .replace("    return", "#line 6\n    return");
        assert_eq!(String::from_utf8(text.write("f.c")).expect("text"), expected);
    }

    #[test]
    fn no_directive_within_macros_comments_and_strings() {
        for (source, line) in [
            ("#define M(x) \\\n    f(x); \\\n    g(x)\nint a;\n", "int a;\n"),
            ("/* one\n * two\n * three */\nint a;\n", "int a;\n"),
            ("char *s = \"(\\\n  (\\\n  \";\nint a;\n", "int a;\n"),
            ("auto s = R\"x(\n )\" ( \n)x\";\nint a;\n", "int a;\n"),
        ] {
            let lines: Vec<&str> = source.split_inclusive('\n').collect();
            let diff = format!("--- a/f.cc\n+++ b/f.cc\n@@ -1,2 +1,3 @@\n {}+ x \\\n {}", lines[0], lines[1]);
            let diff = if lines[0].ends_with("\\\n") { diff } else { diff.replace("+ x \\\n", "+ x\n") };
            let text = applied(&diff, source).expect("it fits");
            assert!(text.contains(&format!("#line 4\n{line}")), "{text}");
            assert_eq!(text.matches("#line").count(), 1, "{text}");
        }
    }

    #[test]
    fn a_hunk_may_have_moved_but_must_fit() {
        let diff = "--- f.c\n+++ f.c\n@@ -40,2 +40,1 @@\n int f(int x)\n-{\n";
        assert_eq!(applied(diff, SOURCE).expect("it fits").lines().nth(2), Some("#line 4"));
        assert!(matches!(
            applied(&diff.replace("int x", "long x"), SOURCE),
            Err(DiffError::DoesNotFit { hunk: 1, line: 40, .. })
        ));
        assert_eq!(applied("hello\n", SOURCE), Err(DiffError::Empty));
        assert!(matches!(applied("--- a\n+++ a\n@@ -1,9 +1,9 @@\n x\n", SOURCE), Err(DiffError::Damaged { .. })));
        let parsed = Diff::parse(diff.as_bytes()).expect("a diff");
        let after = parsed.files[0].apply("f.txt", SOURCE.as_bytes()).expect("it fits");
        let back = parsed.files[0].reversed().apply("f.txt", &after).expect("it fits backwards");
        assert_eq!(back, SOURCE.as_bytes());
        assert!(
            parsed.files[0].reversed().apply("f.txt", SOURCE.as_bytes()).is_ok(),
            "nothing is added: nothing to miss"
        );
        assert!(matches!(applied("--- ../a\n+++ ../a\n@@ -1 +1 @@\n-x\n+y\n", SOURCE), Err(DiffError::Outside(_))));
    }

    #[test]
    fn the_patches_that_a_packages_diff_brings_are_found() {
        let text = "--- /dev/null\n+++ b/debian/patches/fix.patch\n@@ -0,0 +1,4 @@\n+--- a/f.c\n++++ b/f.c\n\
                    +@@ -1 +1 @@\n+-int a;\n++int b;\n--- a/debian/patches/series\n+++ b/debian/patches/series\n\
                    @@ -1 +1,2 @@\n one.patch\n+fix.patch\n--- a/debian/changelog\n+++ b/debian/changelog\n\
                    @@ -1 +1,2 @@\n+new\n old\n"
            .replace("+1,4", "+1,5");
        let mut diff = Diff::parse(text.as_bytes()).expect("a diff");
        let inner = diff.inner().expect("patches");
        assert_eq!(inner.len(), 1);
        let fix = Diff::parse(&inner[0].1).expect("a diff");
        assert_eq!(
            fix.files[0].apply("f.c", SOURCE.as_bytes()).expect("it fits"),
            SOURCE.replace("int a", "int b").as_bytes()
        );
        diff.leave_out_packaging();
        assert!(diff.files.is_empty() && fix.adds_all_of(&fix));
        let changed = text.replace("--- /dev/null", "--- a/debian/patches/fix.patch");
        assert!(matches!(Diff::parse(changed.as_bytes()).expect("a diff").inner(), Err(DiffError::ChangedPatch(_))));
    }

    #[test]
    fn new_files_have_no_numbers_to_keep() {
        let diff = Diff::parse(b"--- /dev/null\n+++ b/new.c\n@@ -0,0 +1,2 @@\n+int a;\n+int b;\n").expect("a diff");
        assert_eq!((diff.files[0].old.as_deref(), diff.files[0].path(1).as_deref()), (None, Some("new.c")));
        assert_eq!(diff.files[0].apply("new.c", b"").expect("it fits"), b"int a;\nint b;\n");
    }
}
