//! The files that make up a process: its executable, its libraries, the vdso, each with where it is mapped and what its
//! image says. In the order in which the target's own linker searches them.

use crate::{
    address::{LoadBias, TargetAddr},
    image::{Image, ImageBytes, Symbol},
    process::{
        files,
        info::living_thread,
        maps::{Mapping, Maps},
        memory::Memory,
    },
};
use std::{
    collections::{HashMap, HashSet},
    fs,
    ops::Range,
    path::Path,
    sync::Arc,
};

/// One mapped image.
#[derive(Clone)]
pub struct Module {
    /// Path as the target sees it (without the kernel's mark for deleted files); `[vdso]`.
    pub path: String,
    /// From its first to its last executable byte.
    pub text: Range<TargetAddr>,
    /// Where the image's addresses lie.
    pub bias: LoadBias,
    /// The file.
    pub image: Arc<Image>,
    /// A file stands behind it (rather than the kernel).
    pub is_file: bool,
    /// The file's name leads elsewhere now, or nowhere.
    pub is_deleted: bool,
}

impl Module {
    /// Last part of the path.
    #[must_use]
    pub fn file_name(&self) -> &str {
        self.path.rsplit('/').next().unwrap_or(&self.path)
    }
}

/// Our own root, by the number that `/proc/N` takes for any.
const OURSELVES: &str = "self";

/// Identity of a file as it is mapped.
type FileKey = (String, u64);

/// Images that have been read, by device and inode; shared by all processes of a target.
#[derive(Default)]
pub struct ImageCache {
    images: HashMap<FileKey, Arc<Image>>,
    /// Paths of modules for which there is no debug file, or whose debug file has been added.
    without_debug: HashSet<String>,
    /// How much of [`ROOM`] is taken.
    read: u64,
}

/// Largest vdso that is read from memory, bytes.
const VDSO_MOST: u64 = 64 * 1024;
/// Files up to this size are read; larger ones are mapped.
const READ_MOST: u64 = 16 << 20;
/// Most bytes that are read of larger files, in all, until the images are forgotten: those that others than root can change are
/// never mapped, and a target must not decide how much memory the agent takes.
const ROOM: u64 = 1 << 30;

impl ImageCache {
    /// Forgets all images: an agent at rest keeps none.
    pub fn clear(&mut self) {
        self.images.clear();
        self.without_debug.clear();
        self.read = 0;
    }

    /// What is in a file, if there is room for it.
    fn content(&mut self, file: &fs::File) -> Option<ImageBytes> {
        let mut room = ROOM.saturating_sub(self.read);
        let length = file.metadata().ok()?.len();
        let bytes =
            if length <= READ_MOST { ImageBytes::read(file, &mut room) } else { ImageBytes::map(file, &mut room) };
        self.read = ROOM - room;
        bytes.ok()
    }

    /// The image behind an executable mapping; `None` for what is no ELF image of ours to understand.
    pub fn image(&mut self, pid: i32, mapping: &Mapping, memory: &Memory) -> Option<Arc<Image>> {
        if mapping.name == "[vdso]" {
            let bytes = memory.bytes(mapping.range.start, mapping.len().min(VDSO_MOST) as usize).ok()?;
            return Image::parse("[vdso]", ImageBytes::from(bytes)).ok().map(Arc::new);
        }
        let key = (mapping.device.clone(), mapping.inode);
        if let Some(image) = self.images.get(&key) {
            return Some(Arc::clone(image));
        }
        // By the mapping, not by name: the name may lead to another file by now, or be another namespace's.
        let file = files::open_by_link(&mapping.map_file(living_thread(pid)?)).ok()?;
        let bytes = self.content(&file)?;
        let image = Arc::new(Image::parse(mapping.path(), bytes).ok()?);
        self.images.insert(key, Arc::clone(&image));
        Some(image)
    }

    /// Adds the symbols of a module's separate debug file, if there is one for exactly this build; says whether.
    pub fn add_debug_symbols(&mut self, pid: i32, module: &mut Module) -> bool {
        if !module.is_file || self.without_debug.contains(&module.path) {
            return false;
        }
        let tid = living_thread(pid).unwrap_or(pid);
        for candidate in module.image.debug_file_candidates() {
            // In the target's root first: a container carries its own debug files. Then in ours.
            let candidate = Path::new(&candidate);
            let opened =
                files::open_in_root_of(tid, candidate).or_else(|_| files::open_in_root_of(OURSELVES, candidate));
            let Some(bytes) = opened.ok().and_then(|file| self.content(&file)) else { continue };
            if let Ok(image) = module.image.with_symbols_from(bytes) {
                self.replace(module, image);
                self.without_debug.insert(module.path.clone());
                return true;
            }
        }
        self.without_debug.insert(module.path.clone());
        false
    }

    /// Adds symbols to a module that somebody knows who has seen this build unstripped. They hold for all processes that map it,
    /// until [`Self::clear`].
    pub fn tell(&mut self, module: &mut Module, symbols: &[Symbol]) {
        if module.image.told() != symbols
            && let Ok(image) = module.image.with_told(symbols)
        {
            self.replace(module, image);
        }
    }

    /// `image` takes the place of the module's, here and for other processes.
    fn replace(&mut self, module: &mut Module, image: Image) {
        let image = Arc::new(image);
        for known in self.images.values_mut().filter(|known| Arc::ptr_eq(known, &module.image)) {
            *known = Arc::clone(&image);
        }
        module.image = image;
    }

    /// The modules of a process, executable first, then in the order of its linker's list. `ours` says which mappings are
    /// our own copies of text pages.
    pub fn modules(
        &mut self,
        pid: i32,
        maps: &Maps,
        memory: &Memory,
        ours: impl Fn(TargetAddr) -> bool,
    ) -> Vec<Module> {
        let mut modules: Vec<Module> = Vec::new();
        let mut by_file: HashMap<FileKey, usize> = HashMap::new();
        for mapping in maps.0.iter().filter(|m| m.executable && (m.is_file() || m.name == "[vdso]")) {
            if ours(mapping.range.start) {
                continue;
            }
            let key = (mapping.device.clone(), mapping.inode);
            if let Some(&known) = by_file.get(&key).filter(|_| mapping.is_file()) {
                let module = &mut modules[known];
                if module.image.load_bias(mapping.range.start, mapping.file_offset) == Some(module.bias) {
                    module.text.end = mapping.range.end;
                }
                continue;
            }
            let Some(image) = self.image(pid, mapping, memory) else { continue };
            let Some(bias) = image.load_bias(mapping.range.start, mapping.file_offset) else { continue };
            by_file.insert(key, modules.len());
            modules.push(Module {
                path: mapping.path().to_owned(),
                text: mapping.range.clone(),
                bias,
                image,
                is_file: mapping.is_file(),
                is_deleted: mapping.is_deleted(),
            });
        }
        let order = search_order(pid, &modules, memory);
        let rank: HashMap<TargetAddr, usize> = order.into_iter().enumerate().map(|(rank, at)| (at, rank)).collect();
        modules
            .sort_by_key(|module| dynamic_section(module).and_then(|at| rank.get(&at)).copied().unwrap_or(usize::MAX));
        modules
    }
}

fn dynamic_section(module: &Module) -> Option<TargetAddr> {
    module.image.dynamic_address().map(|at| at.in_target(module.bias))
}

/// Most modules that are followed in a linker's list.
const MODULES_MOST: usize = 4096;
const DT_NULL: u64 = 0;
const DT_DEBUG: u64 = 21;

/// Addresses of the modules' dynamic sections in the order of the target's linker: executable first. Read from `r_debug`
/// (gABI DT_DEBUG; glibc's `struct link_map`). Empty for static programs.
fn search_order(pid: i32, modules: &[Module], memory: &Memory) -> Vec<TargetAddr> {
    let tid = living_thread(pid).unwrap_or(pid);
    let executable = fs::read_link(format!("/proc/{tid}/exe")).unwrap_or_default();
    let executable = executable.to_string_lossy();
    let executable = executable.strip_suffix(" (deleted)").unwrap_or(&executable);
    let Some(first) = modules.iter().find(|m| m.path == executable).and_then(dynamic_section) else {
        return Vec::new();
    };
    let mut order = vec![first];
    let debug = (0..256).find_map(|index| {
        let tag = memory.word(first.offset(index * 16)).ok()?;
        match tag {
            DT_NULL => Some(None),
            DT_DEBUG => Some(memory.word(first.offset(index * 16 + 8)).ok()),
            _ => None,
        }
    });
    let Some(Some(debug)) = debug else { return order };
    // struct r_debug: version, then the first link_map; struct link_map: address, name, dynamic section, next.
    let mut next = memory.word(TargetAddr(debug).offset(8)).unwrap_or(0);
    while next != 0 && order.len() < MODULES_MOST {
        let Ok(dynamic) = memory.word(TargetAddr(next).offset(16)) else { break };
        if dynamic != first.0 {
            order.push(TargetAddr(dynamic));
        }
        next = memory.word(TargetAddr(next).offset(24)).unwrap_or(0);
    }
    order
}
