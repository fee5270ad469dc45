# Writes the data files and the plotting script into one .cpp: cmake -DOUT=... -DROOT=... -DFILES=a;b -P embed.cmake
set(text "// Written by src/planner/embed.cmake from the files of data/.\n#include \"planner/read.h\"\n\nnamespace flash_mla::planner {\nnamespace {\nconstexpr DataFile kFiles[] = {\n")
foreach(file IN LISTS FILES)
  file(READ "${ROOT}/${file}" content)
  string(APPEND text "{\"${file}\", R\"__data__(${content})__data__\"},\n")
endforeach()
string(APPEND text "};\n}  // namespace\n\nstd::span<const DataFile> data_files() { return kFiles; }\n}  // namespace flash_mla::planner\n")
file(WRITE "${OUT}" "${text}")
