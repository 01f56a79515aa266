//! Names to functions, and back; also where the symbols lie elsewhere.

use super::*;

#[test]
fn functions_are_found_by_name_file_and_address() {
    let shop = two_files(&[]);
    let image = shop.read("program");
    let victim = find(&image, "victim");
    assert!(victim.size > 10 && image.bytes_at(victim.address, victim.size as usize).is_some());
    assert_eq!(image.symbolise(ImageOffset(victim.address.0 + 3)).map(|(_, offset)| offset), Some(3));
    // Two names for one piece of code are one function.
    let alias = find(&image, "also_victim");
    assert_eq!((alias.address, alias.size), (victim.address, victim.size));
    let LookupError::Ambiguous { candidates, .. } = why_not(&image, "twin") else { panic!("ambiguous") };
    assert!(candidates.len() == 2 && candidates.iter().any(|c| c.starts_with("b.c:twin at 0x")), "{candidates:?}");
    let (a, b) = (find(&image, "a.c:twin"), find(&image, "b.c:twin"));
    assert_ne!(a.address, b.address);
    let by_address = FunctionQuery { name: "twin".into(), file: None, address: Some(b.address) };
    assert_eq!(image.find_function(&by_address).expect("one"), b);
    assert_eq!(image.function_at(ImageOffset(b.address.0 + 1)), Some(b.clone()));
    assert_eq!(image.symbolise(ImageOffset(b.address.0 + 1)), Some(("twin".into(), 1)));
    let LookupError::Unknown { similar, .. } = why_not(&image, "victin") else { panic!("unknown") };
    assert_eq!(similar[0], "victim", "{similar:?}");
    assert!(matches!(why_not(&image, "c.c:twin"), LookupError::Unknown { .. }));
    assert!(matches!(why_not(&image, "shared_value"), LookupError::NotAFunction(_)));
    assert!(matches!(why_not(&image, "counter"), LookupError::NotAFunction(_)));
    assert!(matches!(why_not(&image, "0x1"), LookupError::Unknown { .. }));
}

#[test]
fn variables_and_imports_are_found() {
    let shop = two_files(&[]);
    let image = shop.read("program");
    assert_eq!(image.locals("twin", None).len(), 2);
    assert_eq!(image.locals("twin", Some("b.c")).len(), 1);
    let counter = &image.locals("counter", None)[0];
    assert_eq!((counter.kind, counter.size), (SymbolKind::Tls, 4));
    let tls = image.tls_segment().expect("PT_TLS");
    assert!(tls.memory_size >= 4 && tls.file_size >= 4 && tls.alignment >= 4, "{tls:?}");
    let initial = image.bytes_at(ImageOffset(tls.address.0 + counter.address.0), 4);
    assert_eq!(initial, Some(&3i32.to_le_bytes()[..]));
    let shared = &image.locals("shared_value", None)[0];
    assert_eq!(image.bytes_at(shared.address, 4), Some(&5i32.to_le_bytes()[..]));
    assert!(image.needed().iter().any(|library| library.starts_with("libc.so")));
    // As readelf sees it.
    let relocations = shop.run("readelf", &["-rW", "program"]);
    let line = relocations.lines().find(|line| line.contains(" exit@")).expect("exit is imported");
    let slot = u64::from_str_radix(line.split_whitespace().next().expect("an offset"), 16).expect("hex");
    assert_eq!(image.got_slots("exit"), [ImageOffset(slot)]);
    assert!(image.got_slots("no such import").is_empty() && image.export("exit").is_none());
}

#[test]
fn every_function_that_nm_lists_is_known_with_its_size() {
    let shop = two_files(&[]);
    let image = shop.read("program");
    let functions: Vec<Function> = image.functions().collect();
    assert!(functions.is_sorted_by_key(|function| function.address));
    let mut seen = 0;
    for line in shop.run("nm", &["-S", "program"]).lines() {
        if let [address, size, "t" | "T", name] = line.split_whitespace().collect::<Vec<_>>()[..] {
            let hex = |text| u64::from_str_radix(text, 16).expect("hex");
            let known = functions.iter().find(|function| function.address.0 == hex(address));
            assert_eq!(known.map(|function| function.size), Some(hex(size)), "{name}");
            seen += 1;
        }
    }
    assert!(seen >= 6, "{seen}");
    // Without symbols the unwind tables tell the same bounds.
    let bare: Vec<Function> = shop.stripped("program").functions().collect();
    for name in ["victim", "main", "other", "a.c:twin"] {
        let function = find(&image, name);
        let known = bare.iter().find(|bare| bare.address == function.address).expect(name);
        assert_eq!((known.size, &known.name, known.source), (function.size, &None, BoundsSource::UnwindTable));
    }
}

#[test]
fn exports_are_of_the_default_version() {
    let source = r#"
__asm__(".symver old_f, f@V1");
__asm__(".symver new_f, f@@V2");
int old_f(void) { return 1; }
int new_f(void) { return 22; }
int data = 4;
static int hidden(void) { return 5; }
int (*pointer)(void) = hidden;
"#;
    let shop = Workshop::with(&[("l.c", source), ("map", "V1 { global: f; local: *; }; V2 { global: f; data; } V1;")]);
    shop.run("gcc", &["-shared", "-fPIC", "-O1", "-Wl,--version-script=map,-soname,libl.so.7", "-o", "l.so", "l.c"]);
    let image = shop.read("l.so");
    assert_eq!(image.soname(), Some("libl.so.7"));
    let new = find(&image, "new_f");
    let export = image.export("f").expect("exported");
    assert_eq!((export.address, export.kind, export.binding), (new.address, SymbolKind::Function, Binding::Global));
    assert_eq!(image.export("data").map(|data| data.kind), Some(SymbolKind::Data));
    assert!(image.export("hidden").is_none() && image.export("V1").is_none());
    assert_eq!(shop.stripped("l.so").export("f").map(|f| f.address), Some(new.address));
}

#[test]
fn debug_files_and_mini_debuginfo_give_symbols_back() {
    let shop = two_files(&[]);
    shop.run("objcopy", &["--only-keep-debug", "program", "program.debug"]);
    let mut image = shop.stripped("program");
    assert!(matches!(why_not(&image, "a.c:twin"), LookupError::Unknown { .. }));
    let debug = fs::read(shop.path("program.debug")).expect("made");
    let fuller = image.with_symbols_from(ImageBytes::from(debug.clone())).expect("the same build");
    assert_eq!(find(&fuller, "a.c:twin"), find(&shop.read("program"), "a.c:twin"));
    image.add_symbols_from(ImageBytes::from(debug)).expect("the same build");
    assert_eq!(find(&image, "b.c:twin"), find(&fuller, "b.c:twin"));
    let foreign = fs::read(two_files(&["-O1"]).path("program")).expect("built");
    assert!(matches!(image.add_symbols_from(ImageBytes::from(foreign)), Err(ImageError::OtherBuild(_))));
    assert!(matches!(image.add_symbols_from(ImageBytes::from(b"no ELF".to_vec())), Err(ImageError::Damaged { .. })));
    // .gnu_debugdata holds an xz-packed ELF file with a .symtab.
    shop.run("xz", &["-k", "program.debug"]);
    shop.run("objcopy", &["--add-section", ".gnu_debugdata=program.debug.xz", "program.stripped", "mini"]);
    assert_eq!(find(&shop.read("mini"), "b.c:twin"), find(&fuller, "b.c:twin"));
}

#[test]
fn debug_files_are_looked_for_where_gdb_does() {
    let shop = two_files(&[]);
    shop.run("objcopy", &["--only-keep-debug", "program", "program.debug"]);
    shop.run("objcopy", &["--strip-all", "--add-gnu-debuglink=program.debug", "program", "linked"]);
    let image = shop.read("linked");
    let candidates = image.debug_file_candidates();
    let id = image.build_id_hex().expect("a build-id");
    assert_eq!(candidates[0], format!("/usr/lib/debug/.build-id/{}/{}.debug", &id[..2], &id[2..]));
    let directory = shop.path("").display().to_string();
    let directory = directory.trim_end_matches('/');
    for expected in ["", "/.debug"].map(|sub| format!("{directory}{sub}/program.debug")) {
        assert!(candidates.contains(&expected), "{expected}: {candidates:?}");
    }
    assert!(candidates.contains(&format!("/usr/lib/debug{directory}/program.debug")), "{candidates:?}");
}
