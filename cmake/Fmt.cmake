# {fmt} 8 or later, as the target flash_mla_fmt. Of an installed {fmt} only the headers are used: src/base/fmt.cpp
# compiles what is in its library, and $<TARGET_OBJECTS:flash_mla_fmt_objects> goes into each library that is installed
# without another of ours to find it in. So nothing built here needs libfmt at run time.
find_package(fmt REQUIRED)

add_library(flash_mla_fmt INTERFACE)
target_include_directories(flash_mla_fmt SYSTEM
                           INTERFACE $<BUILD_INTERFACE:$<TARGET_PROPERTY:fmt::fmt,INTERFACE_INCLUDE_DIRECTORIES>>)
# A namespace of our own: a static library of ours meets no symbol of the {fmt} that its user links.
target_compile_definitions(
  flash_mla_fmt INTERFACE "$<$<COMPILE_LANGUAGE:CXX>:FMT_BEGIN_NAMESPACE=namespace fmt { inline namespace flash_mla_fmt {>"
                          "$<$<COMPILE_LANGUAGE:CXX>:FMT_END_NAMESPACE=}}>")
add_library(flash_mla_fmt_objects OBJECT src/base/fmt.cpp)
flash_mla_target_defaults(flash_mla_fmt_objects)
target_link_libraries(flash_mla_fmt_objects PRIVATE flash_mla_fmt)
