//! What Debian's packages say of themselves: which source and version a binary package comes from, which files it brings. Only
//! reads texts; not for fetching, which is `apt`.

/// A package that is installed, or could be.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Package {
    /// Name, without architecture.
    pub name: String,
    /// Version of the binary package; after a rebuild without changes of the source (`+b1`) not the source's.
    pub version: String,
    /// Source package.
    pub source: String,
    /// Version of the source package.
    pub source_version: String,
}

/// What `dpkg-query` is asked, for [`installed`].
pub const FORMAT: &str =
    "${db:Status-Status}\\t${Architecture}\\t${Package}\\t${Version}\\t${source:Package}\\t${source:Version}\\n";

/// The installed packages, by what `dpkg-query -W -f FORMAT` says.
#[must_use]
pub fn installed(text: &str) -> Vec<Package> {
    let package = |line: &str| {
        let fields: Vec<&str> = line.split('\t').collect();
        let [status, architecture, name, version, source, source_version] = fields[..] else { return None };
        let is_ours = status == "installed" && matches!(architecture, "amd64" | "all");
        let [name, version, source, source_version] = [name, version, source, source_version].map(str::to_owned);
        is_ours.then_some(Package { name, version, source, source_version })
    };
    text.lines().filter_map(package).collect()
}

/// A package by what `apt-cache show` says; its first record counts.
#[must_use]
pub fn shown(text: &str) -> Option<Package> {
    let first = text.split("\n\n").next()?;
    let field = |name| values(first, name).next().map(str::to_owned);
    let (name, version) = (field("Package")?, field("Version")?);
    // `Source: name (version)`, each where it is another.
    let source = field("Source").unwrap_or_else(|| name.clone());
    let (source, source_version) = match source.split_once(" (") {
        Some((source, version)) => (source.to_owned(), version.trim_end_matches(')').to_owned()),
        None => (source, version.clone()),
    };
    Some(Package { name, version, source, source_version })
}

/// The values of a field in all records.
pub fn values<'a>(text: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    text.lines().filter_map(move |line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim)
}

/// The names in a list of dependencies, without versions and architectures.
#[must_use]
pub fn names(list: &str) -> Vec<String> {
    let name = |part: &str| part.split(['(', ':', '[', '<']).next().unwrap_or_default().trim().to_owned();
    list.split([',', '|']).map(name).filter(|name| !name.is_empty()).collect()
}

/// The names of what a source package needs to be built on this architecture, by its description; such lists go over several lines.
#[must_use]
pub fn build_dependencies(dsc: &str) -> Vec<String> {
    let mut list = String::new();
    let mut is_wanted = false;
    for line in dsc.lines() {
        if line.starts_with([' ', '\t']) {
            if is_wanted {
                list.push_str(line);
            }
        } else {
            let rest = ["Build-Depends:", "Build-Depends-Arch:"].iter().find_map(|name| line.strip_prefix(name));
            is_wanted = rest.is_some();
            if let Some(rest) = rest {
                list.push(',');
                list.push_str(rest);
            }
        }
    }
    names(&list)
}

/// The version without its epoch, as file names have it.
#[must_use]
pub fn without_epoch(version: &str) -> &str {
    version.split_once(':').map_or(version, |(_, version)| version)
}

/// File name of a source package's description.
#[must_use]
pub fn dsc_name(source: &str, version: &str) -> String {
    format!("{source}_{}.dsc", without_epoch(version))
}

/// The folder that `dpkg-source -x` makes.
#[must_use]
pub fn folder_name(source: &str, version: &str) -> String {
    let version = without_epoch(version);
    let upstream = version.rsplit_once('-').map_or(version, |(upstream, _)| upstream);
    format!("{source}-{upstream}")
}

/// The first entry of a changelog: what a rebuild added.
#[must_use]
pub fn first_entry(changelog: &str) -> Option<String> {
    let end = changelog.find("\n -- ")?;
    let line_end = changelog[end + 1..].find('\n').map_or(changelog.len(), |length| end + 1 + length);
    Some(format!("{}\n\n", &changelog[..line_end]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn packages_tell_their_source() {
        let text = "installed\tamd64\tredis-server\t5:7.0.15-1~deb12u10\tredis\t5:7.0.15-1~deb12u10\n\
                    config-files\tamd64\told\t1\told\t1\ninstalled\ti386\tlibc6\t2\tglibc\t2\n\
                    installed\tamd64\tlibx\t1.0-2+b1\tx\t1.0-2\n";
        let found = installed(text);
        assert_eq!(found.iter().map(|package| package.name.as_str()).collect::<Vec<_>>(), ["redis-server", "libx"]);
        assert_eq!((found[1].source.as_str(), found[1].source_version.as_str()), ("x", "1.0-2"));
        let shown = |text| shown(text).map(|package| (package.source, package.source_version));
        let pair = |a: &str, b: &str| Some((a.to_owned(), b.to_owned()));
        assert_eq!(shown("Package: libx\nSource: x (1.0-2)\nVersion: 1.0-2+b1\n"), pair("x", "1.0-2"));
        assert_eq!(shown("Package: a\nSource: b\nVersion: 1:2-3\n\nPackage: c\nVersion: 9\n"), pair("b", "1:2-3"));
        assert_eq!(shown("Package: a\nVersion: 4\n"), pair("a", "4"));
        assert_eq!(shown(""), None);
    }

    #[test]
    fn versions_become_file_names() {
        assert_eq!(dsc_name("redis", "5:7.0.15-1~deb12u10"), "redis_7.0.15-1~deb12u10.dsc");
        assert_eq!(folder_name("redis", "5:7.0.15-1~deb12u10"), "redis-7.0.15");
        assert_eq!(folder_name("native", "1.2"), "native-1.2");
        assert_eq!(folder_name("a", "1-rc-2"), "a-1-rc");
        assert_eq!(names("libc6 (>= 2.34), a:any | b, c [amd64], d <!nocheck>"), ["libc6", "a", "b", "c", "d"]);
    }

    #[test]
    fn dependencies_of_a_build_are_read() {
        let dsc = "Format: 3.0\nBuild-Depends: debhelper-compat (= 13), libssl-dev,\n libz-dev <!nocheck>\nBuild-Depends-Indep: tex\nFiles:\n a b\n";
        assert_eq!(build_dependencies(dsc), ["debhelper-compat", "libssl-dev", "libz-dev"]);
    }

    #[test]
    fn what_a_rebuild_added_is_found() {
        let text = "x (1-2+b1) sid; urgency=low, binary-only=yes\n\n  * Rebuild\n\n -- A <a@b>  Mon, 01 Jan 2024 00:00:00 +0000\n\nx (1-2) sid; urgency=low\n";
        let entry = first_entry(text).expect("an entry");
        assert!(entry.starts_with("x (1-2+b1)") && entry.ends_with("+0000\n\n") && !entry.contains("(1-2) "));
        assert_eq!(first_entry("nothing"), None);
    }
}
