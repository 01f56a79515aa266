//! Images that others built: the system's own.

use super::*;

#[test]
fn a_stripped_server_keeps_its_exported_functions() {
    let path = Path::new("/usr/sbin/apache2");
    if !path.exists() {
        println!("skipped: no {}", path.display());
        return;
    }
    let image = read(path);
    let function = find(&image, "ap_byterange_filter");
    let listed = Workshop::with(&[]).run("nm", &["-D", "-S", "/usr/sbin/apache2"]);
    let line = listed.lines().find(|line| line.ends_with(" ap_byterange_filter")).expect("nm lists it");
    let numbers: Vec<u64> = line.split(' ').take(2).map(|text| u64::from_str_radix(text, 16).expect("hex")).collect();
    assert_eq!([function.address.0, function.size], numbers[..]);
    assert_eq!(function.source, BoundsSource::Symbol);
    assert!(!image.got_slots("apr_table_get").is_empty());
}

#[test]
fn symbols_and_unwind_tables_of_a_large_library_agree() {
    let Some(path) = ["/usr/lib/x86_64-linux-gnu/libstdc++.so.6", "/usr/lib64/libstdc++.so.6"]
        .map(Path::new)
        .into_iter()
        .find(|p| p.exists())
    else {
        println!("skipped: no libstdc++");
        return;
    };
    let image = read(path);
    let (mut same, mut other) = (0, Vec::new());
    for function in image.functions().filter(|f| f.source == BoundsSource::Symbol) {
        match image.unwind.bounds_at(&image, function.address) {
            Some(bounds) if bounds == (function.address..ImageOffset(function.address.0 + function.size)) => same += 1,
            bounds => other.push((function, bounds)),
        }
    }
    assert!(same > 1000 && other.len() * 50 < same, "{same} agree, {} don't: {:?}", other.len(), other.first());
    // Every function is found again by any of its addresses, and by its name.
    for function in image.functions().step_by(97) {
        let last = ImageOffset(function.address.0 + function.size - 1);
        assert_eq!(image.function_at(last), Some(function.clone()));
        if let Some(name) = &function.name {
            let query = FunctionQuery { name: name.clone(), address: Some(function.address), file: None };
            assert_eq!(image.find_function(&query).expect("by its own name").address, function.address);
        }
        assert!(image.body(&function).ranges.len() < 20, "{function:?}: {:?}", image.body(&function));
    }
}
