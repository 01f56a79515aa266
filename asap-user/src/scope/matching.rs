//! What names and control groups in `/proc` mean. Pure.

/// A file that is looked for among those that processes run or map.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct NamedFile {
    /// As it is now.
    inode: Option<(u64, u64)>,
    name: Name,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Name {
    /// The whole path.
    Path(String),
    /// The last part of it.
    Last(String),
}

/// What the kernel writes behind the name of a file that has none any more.
const DELETED: &str = " (deleted)";

impl NamedFile {
    /// The file at `path`, which has this device and inode now; also one that was there before it was replaced.
    pub fn by_path(path: &str, inode: Option<(u64, u64)>) -> Self {
        Self { inode, name: Name::Path(path.to_owned()) }
    }

    /// Any file of that name.
    pub fn by_name(name: &str) -> Self {
        Self { inode: None, name: Name::Last(name.to_owned()) }
    }

    /// Whether it is the one that `shown` names, or that has this identity.
    pub fn is(&self, shown: &str, inode: Option<(u64, u64)>) -> bool {
        self.is_named(shown) || self.is_inode(inode)
    }

    /// The same for a name in a memory map, where line ends are written as `\012` (proc_pid_maps(5)).
    pub fn is_mapped(&self, shown: &str) -> bool {
        self.is_named(shown) || (shown.contains("\\012") && self.is_named(&shown.replace("\\012", "\n")))
    }

    fn is_named(&self, shown: &str) -> bool {
        // A file may really be called so.
        [Some(shown), shown.strip_suffix(DELETED)].into_iter().flatten().any(|shown| match &self.name {
            Name::Path(path) => path == shown,
            Name::Last(name) => shown.rsplit('/').next() == Some(name),
        })
    }

    /// Whether a file with this inode number could be it.
    pub fn may_be_inode(&self, number: u64) -> bool {
        self.inode.is_some_and(|(_, own)| own == number)
    }

    /// Whether it has this identity.
    pub fn is_inode(&self, inode: Option<(u64, u64)>) -> bool {
        self.inode.is_some() && self.inode == inode
    }
}

/// Whether `groups` (the text of `/proc/PID/cgroup`) lies in the control group `unit`, or in one below it; `nginx` means
/// `nginx.service`.
pub(super) fn is_in_unit(groups: &str, unit: &str) -> bool {
    !unit.is_empty()
        && groups.lines().any(|line| {
            // hierarchy:controllers:path; a path may hold colons.
            let path = line.splitn(3, ':').nth(2).unwrap_or_default();
            path.strip_suffix(DELETED)
                .unwrap_or(path)
                .split('/')
                .any(|part| part == unit || part.strip_suffix(".service") == Some(unit))
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_known_by_its_name_also_after_it_was_replaced() {
        let file = NamedFile::by_path("/usr/lib/libx.so.1", Some((8, 77)));
        for shown in ["/usr/lib/libx.so.1", "/usr/lib/libx.so.1 (deleted)"] {
            assert!(file.is(shown, None), "{shown}");
        }
        for shown in
            ["/usr/lib/libx.so.10", "/usr/lib/libx.so.1 (deleted) (deleted)", "libx.so.1", "", "/x/usr/lib/libx.so.1"]
        {
            assert!(!file.is(shown, None), "{shown}");
        }
        assert!(file.is("/another/name", Some((8, 77))) && !file.is("/another/name", Some((9, 77))));
        assert!(file.may_be_inode(77) && !file.may_be_inode(78));
        assert!(!NamedFile::by_name("x").is_inode(None), "nothing is no identity");
    }

    #[test]
    fn a_bare_name_means_any_file_of_that_name() {
        let file = NamedFile::by_name("libx.so.1");
        assert!(file.is_mapped("/usr/lib/libx.so.1") && file.is_mapped("/snap/libx.so.1 (deleted)"));
        assert!(!file.is_mapped("/usr/lib/my-libx.so.1") && !file.is_mapped("/libx.so.1/other"));
    }

    #[test]
    fn line_ends_in_mapped_names_are_read() {
        let file = NamedFile::by_path("/tmp/a\nb", None);
        assert!(file.is_mapped("/tmp/a\\012b") && !file.is_mapped("/tmp/a"));
    }

    #[test]
    fn a_unit_is_a_part_of_the_path() {
        let two = "0::/system.slice/nginx.service\n";
        for unit in ["nginx", "nginx.service", "system.slice"] {
            assert!(is_in_unit(two, unit), "{unit}");
        }
        for unit in ["ngin", "service", "nginx.servic", "system", "0", ""] {
            assert!(!is_in_unit(two, unit), "{unit}");
        }
        let one = "4:memory:/system.slice/a:b.service\n1:name=systemd:/system.slice/a:b.service/sub\n0::/\n";
        assert!(is_in_unit(one, "a:b") && is_in_unit(one, "sub") && !is_in_unit(one, "memory"));
        assert!(is_in_unit("0::/x.service (deleted)\n", "x"));
    }
}
