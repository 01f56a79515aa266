//! Debian's package indexes under a private configuration of apt: own lists, own state, own suites. The machine's apt is neither
//! changed nor asked to install anything; only how it reaches its mirrors is taken from it.

use anyhow::{Context, Result, ensure};
use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Duration,
};

/// Where Debian is, if the machine's own configuration doesn't say.
const MIRROR: &str = "http://deb.debian.org/debian";
const SECURITY_MIRROR: &str = "http://deb.debian.org/debian-security";
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";
/// Indexes older than this are fetched again.
const FRESH: Duration = Duration::from_secs(24 * 3600);

/// Which indexes are fetched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Of binary packages.
    Packages,
    /// Of source packages.
    Sources,
}

/// A suite of Debian's; true: of the security archive.
pub type Suite = (&'static str, bool);

/// Package indexes in a folder of their own.
#[derive(Clone, Debug)]
pub struct Indexes {
    folder: PathBuf,
}

impl Indexes {
    /// Fetches them into `cache`/apt, unless they are a day old at most. `task` is who speaks.
    ///
    /// # Errors
    /// They can't be fetched, and are not there from before.
    pub fn open(cache: &Path, kind: Kind, suites: &[Suite], task: &str) -> Result<Self> {
        let indexes = Self { folder: cache.join("apt") };
        let stamp = indexes.folder.join("fetched");
        let age = fs::metadata(&stamp).and_then(|meta| meta.modified()).ok().and_then(|time| time.elapsed().ok());
        if age.is_none_or(|age| age > FRESH) {
            indexes.configure(kind, suites)?;
            eprintln!("{task}: fetching Debian's package indexes");
            let fetched = output(indexes.apt("apt-get").args(["-qq", "--error-on=any", "update"]));
            match fetched {
                Ok(_) => fs::write(&stamp, "")?,
                // An old index is as good: what it names is still there, or the download will say so.
                Err(error) if age.is_some() => eprintln!("{task}: the indexes of last time are used: {error:#}"),
                Err(error) => return Err(error),
            }
        }
        Ok(indexes)
    }

    /// `apt-get` or `apt-cache` with this configuration.
    #[must_use]
    pub fn apt(&self, program: &str) -> Command {
        let mut command = Command::new(program);
        command.env("APT_CONFIG", self.folder.join("apt.conf")).stdin(Stdio::null());
        command
    }

    /// Writes a configuration of apt that is all our own, but for how the machine reaches its mirrors.
    fn configure(&self, kind: Kind, suites: &[Suite]) -> Result<()> {
        let apt = &self.folder;
        for folder in ["lists/partial", "archives/partial", "parts", "preferences"] {
            fs::create_dir_all(apt.join(folder))?;
        }
        fs::write(apt.join("status"), "")?;
        let (mirror, security) = mirrors();
        let signed = if Path::new(KEYRING).exists() { format!(" signed-by={KEYRING}") } else { String::new() };
        let start = match kind {
            Kind::Packages => format!("deb [arch=amd64 target=Packages{signed}]"),
            Kind::Sources => format!("deb-src [target=Sources{signed}]"),
        };
        let line = |&(suite, of_security): &Suite| {
            let mirror = if of_security { &security } else { &mirror };
            format!("{start} {mirror} {suite} main\n")
        };
        fs::write(apt.join("sources.list"), suites.iter().map(line).collect::<String>())?;
        // Proxies and the like; not what the machine does with its own indexes.
        let known = output(Command::new("apt-config").arg("dump")).unwrap_or_default();
        let reach = known.lines().filter(|line| line.starts_with("Acquire::") && !line.contains("::IndexTargets"));
        let mut text: String = reach.map(|line| format!("{line}\n")).collect();
        let own = apt.display();
        text += &format!(
            "Dir::State::lists \"{own}/lists\";\nDir::State::status \"{own}/status\";\nDir::Cache \"{own}\";\n\
             Dir::Cache::archives \"{own}/archives\";\nDir::Etc::sourcelist \"{own}/sources.list\";\n\
             Dir::Etc::sourceparts \"{own}/parts\";\nDir::Etc::parts \"{own}/parts\";\nDir::Etc::main \"{own}/none\";\n\
             Dir::Etc::preferences \"{own}/none\";\nDir::Etc::preferencesparts \"{own}/preferences\";\n\
             APT::Architecture \"amd64\";\nAPT::Architectures:: \"amd64\";\nAPT::Sandbox::User \"\";\nAcquire::Languages \"none\";\n"
        );
        fs::write(apt.join("apt.conf"), text)?;
        Ok(())
    }
}

/// What a command prints.
///
/// # Errors
/// It can't be started, or fails.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?} can't be started"))?;
    let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    ensure!(output.status.success(), "{command:?} ended with {}: {errors}", output.status);
    Ok(text.into_owned())
}

/// The values of a field in what apt-cache shows.
pub fn field<'a>(shown: &'a str, name: &'a str) -> impl Iterator<Item = &'a str> {
    shown.lines().filter_map(move |line| line.strip_prefix(name)?.strip_prefix(": "))
}

/// The mirrors that this machine's apt knows.
fn mirrors() -> (String, String) {
    let targets = output(Command::new("apt-get").args(["indextargets", "--format", "$(ORIGIN)|$(LABEL)|$(REPO_URI)"]));
    let targets = targets.unwrap_or_default();
    let of = |label: &str, otherwise: &str| {
        let start = format!("Debian|{label}|");
        let known = targets.lines().find_map(|line| line.strip_prefix(&start));
        known.filter(|uri| uri.starts_with("http")).unwrap_or(otherwise).to_owned()
    };
    (of("Debian", MIRROR), of("Debian-Security", SECURITY_MIRROR))
}
