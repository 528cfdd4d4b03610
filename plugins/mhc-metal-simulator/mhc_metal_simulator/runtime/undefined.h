// The calls that clang puts where C++ leaves the outcome undefined (-fsanitize=array-bounds,
// integer-divide-by-zero). Their arguments have the line of the source.
#pragma once
#include "memory.h"

struct SourceLocation {
    const char* file;
    u32 line, column;
};
struct TypeName {
    u16 kind, info;
    char name[1];
};
struct IndexOutOfBounds {
    SourceLocation where;
    const TypeName *array, *index;
};
struct Overflow {
    SourceLocation where;
    const TypeName* type;
};

[[noreturn]] static void undefined(Fault& fault, const SourceLocation& where,
                                   const TypeName* type) {
    fault.line = where.line;
    fault.column = where.column;
    fault.text = type->name;
    stop();
}

MHC_INTERNAL void __ubsan_handle_out_of_bounds(IndexOutOfBounds* data, u64 index) {
    Fault& fault = new_fault(INDEX_OUT_OF_BOUNDS, m.current);
    fault.offset = i64(index);
    undefined(fault, data->where, data->array);
}

MHC_INTERNAL void __ubsan_handle_divrem_overflow(Overflow* data, u64, u64) {
    undefined(new_fault(DIVISION_BY_ZERO, m.current), data->where, data->type);
}
